"""Faults of the disk that are reported before the first step."""

import shutil
from collections import namedtuple

import pytest

from rwkv_accel.checkpoint.format import write_folder
from rwkv_accel.config.load import load_config
from rwkv_accel.disk import foresee_space, prove_writable
from rwkv_accel.errors import UserError

Usage = namedtuple("Usage", "total used free")
MIB = 1 << 20


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"out_dir: {tmp_path}\nmodel: {{path: b.pth}}\ndata: {{path: a.jsonl}}\n")
    return load_config(path, ["checkpoint.keep_last=3"])


@pytest.fixture
def model():
    import torch

    model = torch.nn.Linear(512, 512)  # 1 MiB in fp32, and a bias that is not trained
    model.bias.requires_grad_(False)
    return model


def with_free(monkeypatch, mebibytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, int(mebibytes * MIB)))


# A checkpoint takes 3 MiB (weights and two moments), saved weights 1 MiB; 3 are kept while a fourth is written.
@pytest.mark.parametrize("free", [14.0, 100.0])
def test_room_enough(config, model, monkeypatch, free):
    with_free(monkeypatch, free)
    assert foresee_space(config, model) is None


def test_room_for_some(config, model, monkeypatch):
    with_free(monkeypatch, 13.9)
    text = foresee_space(config, model)
    assert "13.9 MiB of free space; a checkpoint of this run takes about 3.0 MiB" in text
    assert "checkpoint.keep_last=3 it will need 14.0 MiB" in text


def test_checkpoints_that_are_there_need_no_more_room(config, model, monkeypatch, tmp_path):
    for step in (1, 2, 3):
        write_folder(tmp_path / "checkpoints" / f"step-{step}", step=step, tensors={}, documents={"state.json": "{}"})
    with_free(monkeypatch, 5.0)
    assert foresee_space(config, model) is None


def test_no_room_at_all_is_refused(config, model, monkeypatch):
    with_free(monkeypatch, 3.9)
    with pytest.raises(UserError, match=r"3\.9 MiB of free space.*free some, or choose another out_dir"):
        foresee_space(config, model)


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "best"])
def test_folder_that_cannot_be_written_is_named(tmp_path, name):
    prove_writable(tmp_path)
    (tmp_path / name).write_text("not a folder")
    with pytest.raises(UserError, match=f"{name} cannot be written: Not a directory"):
        prove_writable(tmp_path)
