"""Long work says how far it has come: on a terminal, in a log file, on the first process only."""

import io
import json

import pytest
import torch

from rwkv_accel import progress as module
from rwkv_accel.config.schema import ModelConfig, PeftConfig
from rwkv_accel.model.io import checkpoint_digest
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.progress import progress, set_progress_mode
from tests.helpers import tiny_checkpoint
from tests.unit.data.conftest import make_loader


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    monkeypatch.setattr(module, "_mode", "auto")
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def clock():
    """Three seconds pass between two looks."""
    seconds = iter(range(0, 3000, 3))
    return lambda: next(seconds)


def test_items_pass_and_lines_come_now_and_then(clock):
    stream = io.StringIO()
    assert list(progress(["a", "b", "c", "d"], "loading", unit="tensors", stream=stream, clock=clock)) == list("abcd")
    assert stream.getvalue() == "loading: 1/4 tensors\nloading: 3/4 tensors\n"


def test_totals_of_generators_are_given_or_unknown(clock):
    stream = io.StringIO()
    list(progress(iter("abc"), "hashing", stream=stream, clock=clock))
    list(progress(iter("abc"), "merging", total=5000, stream=stream, clock=clock))
    assert stream.getvalue() == "hashing: 1\nmerging: 1/5,000\n"


def test_quick_work_says_nothing():
    for stream in (io.StringIO(), Terminal()):
        assert list(progress(range(3), "svd", stream=stream)) == [0, 1, 2]
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BEFORE_BAR", 0.0)
    stream = Terminal()
    assert list(progress(range(3), "svd", unit="tensors", stream=stream)) == [0, 1, 2]
    assert "svd:   0%|" in stream.getvalue()
    assert "0/3 [" in stream.getvalue()


def test_other_processes_and_a_recipe_that_wants_none_are_silent(clock, monkeypatch):
    stream = io.StringIO()
    set_progress_mode("none")
    list(progress(range(9), "x", stream=stream, clock=clock))
    set_progress_mode("lines")
    monkeypatch.setenv("RANK", "3")
    list(progress(range(9), "x", stream=stream, clock=clock))
    assert stream.getvalue() == ""
    monkeypatch.setenv("RANK", "0")
    list(progress(range(9), "x", stream=stream, clock=clock))
    assert stream.getvalue() != ""


@pytest.fixture
def said(monkeypatch, capsys):
    """Every line that the work could say, had it taken long."""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(module, "_mode", "lines")
    return lambda: capsys.readouterr().err


def test_tokenising_is_shown(tmp_path, said):
    (tmp_path / "d.jsonl").write_text((json.dumps({"text": "abc"}) + "\n") * 3)
    make_loader(str(tmp_path / "d.jsonl"))
    assert "tokenising d.jsonl: 2 documents\n" in said()


def test_loading_quantising_and_hashing_are_shown(tmp_path, said):
    base = tiny_checkpoint(tmp_path / "base.pth", n_layer=1)
    peft = PeftConfig(method="pissa", rank=2, base_quant="nf4")
    load_model_and_apply_peft(ModelConfig(path=str(base)), peft)
    assert "loading base.pth, quantising to nf4, decomposing for pissa: 5/" in said()
    checkpoint_digest(base)
    assert "hashing base.pth: 5/" in said()


def test_merging_is_shown(tmp_path, said):
    from rwkv_accel.model.io import read_checkpoint
    from rwkv_accel.peft.merge import merged_tensors

    base = read_checkpoint(tiny_checkpoint(tmp_path / "base.pth", n_layer=1))
    for name, tensor in merged_tensors(base, [], None):
        assert torch.equal(tensor, base[name])
    assert f"merging: {len(base) - 1}/{len(base)} tensors" in said()
