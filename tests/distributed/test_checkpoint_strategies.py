"""Checkpoints between real processes: exact on the same number of them, portable to any strategy and number.

Every launch is a training of checkpoint_worker.py. The first of a strategy saves, the second starts afresh, must
continue the first bit for bit (dropout included), and then takes over from every other strategy.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import checkpoint_worker
from tests.distributed.forked_launch import forked_launch

# Accelerate config and number of processes.
RUNS = {"single": ("cpu", 1), **{name: (name, 2) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}}
LOSS_TOLERANCE = 1e-5
# Of parameters that moved by 1e-2: other strategies add gradients up in another order.
PARAM_TOLERANCE = 5e-6


def work(out_dir, run, commands, timeout=120, **job):
    config, processes = RUNS[run] if isinstance(run, str) else run
    out_dir.mkdir(exist_ok=True)
    job |= {"out_dir": str(out_dir), "commands": commands}
    forked_launch(checkpoint_worker.main, config, processes, job, log=out_dir / "log.txt", timeout=timeout)


def read(out_dir, name):
    return torch.load(out_dir / f"{name}.pt")


def assert_same(left, right):
    assert left["steps"] == right["steps"]
    for part in ("params", "moments"):
        assert left[part].keys() == right[part].keys()
        for name, value in left[part].items():
            assert torch.equal(value.view(torch.int32), right[part][name].view(torch.int32)), (part, name)


def assert_close(found, expected):
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    for name, value in expected["params"].items():
        torch.testing.assert_close(found["params"][name], value, rtol=0, atol=PARAM_TOLERANCE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints at step 3 (no dropout) and step 6 (dropout) of every strategy, and where each run ended."""
    out_dir = tmp_path_factory.mktemp("strategies")
    for run in RUNS:
        work(
            out_dir,
            run,
            [
                ["save", f"{run}-fresh"],
                ["train", 3],
                ["save", f"{run}-plain"],
                ["dropout", 0.1],
                ["train", 6],
                ["save", run],
                ["train", 9],
                ["dump", f"{run}-end"],
            ],
        )
    return out_dir


@pytest.fixture(scope="module")
def resumed(saved):
    """Fresh processes of every strategy that continue their own run, then the run of each other strategy."""
    for run in RUNS:
        commands = [["load", run], ["dump", f"{run}-loaded"], ["dropout", 0.1], ["train", 9]]
        commands += [["dump", f"{run}-resumed"], ["dropout", 0.0]]
        for source in RUNS:
            commands += [["load", f"{source}-plain"], ["dump", f"{source}-in-{run}"]]
            commands += [["train", 6], ["dump", f"{source}-in-{run}-end"]]
        commands += [["load", f"{run}-fresh"], ["train", 3], ["dump", f"{run}-from-fresh"]]
        work(saved, run, commands)
    return saved


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(resumed, run):
    end, again = read(resumed, f"{run}-end"), read(resumed, f"{run}-resumed")
    assert_same(again, end)
    assert again["losses"] == end["losses"][6:]
    assert set(again["steps"].values()) == {9}


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_before_the_first_step_starts_the_run(resumed, run):
    plain = load_file(resumed / "checkpoints" / f"{run}-plain" / "trainable.safetensors")
    from_fresh = read(resumed, f"{run}-from-fresh")["params"]
    assert not load_file(resumed / "checkpoints" / f"{run}-fresh" / "optimizer.safetensors")
    for name, value in plain.items():
        assert torch.equal(from_fresh[name], value), name


@pytest.mark.parametrize("target", RUNS)
@pytest.mark.parametrize("source", RUNS)
def test_any_strategy_continues_any_other(resumed, source, target):
    folder = resumed / "checkpoints" / f"{source}-plain"
    arrived = read(resumed, f"{source}-in-{target}")
    on_disk = {"params": load_file(folder / "trainable.safetensors")}
    on_disk["moments"] = load_file(folder / "optimizer.safetensors")
    on_disk["steps"] = dict.fromkeys(on_disk["params"], 3)
    assert_same(arrived, on_disk)
    assert_close(read(resumed, f"{source}-in-{target}-end"), read(resumed, "single-in-single-end"))


@pytest.mark.parametrize("run", RUNS)
def test_no_frozen_tensor_is_on_disk(saved, run):
    folder = saved / "checkpoints" / run
    params, moments = load_file(folder / "trainable.safetensors"), load_file(folder / "optimizer.safetensors")
    trained = {f"blocks.{i}.{n}" for i in (0, 1) for n in ("ln.weight", "ln.bias", "mix", "odd")}
    trained |= {f"blocks.{i}.key.lora_{n}" for i in (0, 1) for n in "AB"} | {"head.weight"}
    assert set(params) == trained
    assert set(moments) == {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in trained}
    assert params["blocks.0.odd"].shape == (7,)
    num_bytes = sum((folder / f).stat().st_size for f in ("trainable.safetensors", "optimizer.safetensors"))
    header = 16000  # names, many for so few values
    assert num_bytes < 3 * 4 * sum(p.numel() for p in params.values()) + header
    assert len(json.loads((folder / "rng.json").read_text())) == RUNS[run][1]


def test_every_process_refuses_a_damaged_checkpoint_together(saved):
    folder = saved / "checkpoints" / "ddp-plain"
    (saved / "damaged" / "checkpoints").mkdir(parents=True)
    damaged = saved / "damaged" / "checkpoints" / "ddp-plain"
    damaged.mkdir()
    for file in folder.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "optimizer.safetensors":
            data[-1] ^= 1
        (damaged / file.name).write_bytes(data)
    work(saved / "damaged", "ddp", [["refuse", "ddp-plain"]])
    for rank in (0, 1):
        text = (saved / "damaged" / f"ddp-plain-{rank}.txt").read_text()
        assert "optimizer.safetensors do not fit its checksum" in text, "the rank that did not read all bytes too"


def test_the_main_process_decides_when_minutes_are_over(tmp_path):
    worker, job = checkpoint_worker.agree_on_minutes, {"out_dir": str(tmp_path)}
    forked_launch(worker, "ddp", 2, job, log=tmp_path / "log.txt")
    for rank in (0, 1):
        assert (tmp_path / f"due-{rank}.txt").read_text() == "[False, False, True, False]"


MATRIX = [(name, processes) for name in ("zero1", "zero2", "zero3", "ddp") for processes in (1, 2, 3)]
MATRIX[MATRIX.index(("ddp", 1))] = ("cpu", 1)
COMPILE_SECONDS = 600  # offload compiles DeepSpeed's CPU Adam once


def label(run):
    return f"{run[0]}-{run[1]}"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd-momentum"])
def test_elastic_matrix(tmp_path, optimizer):
    """{1, 2, 3 processes} x {one copy, ZeRO-1, 2, 3} into each other; the next 10 steps agree."""
    for run in MATRIX:
        work(tmp_path, run, [["train", 3], ["save", label(run)]], optimizer=optimizer)
    work(tmp_path, ("cpu", 1), [["train", 13], ["dump", "undisturbed"]], optimizer=optimizer)
    expected = read(tmp_path, "undisturbed")
    expected["losses"] = expected["losses"][3:]
    for run in MATRIX:
        commands = []
        for source in MATRIX:
            commands += [["load", label(source)], ["train", 13], ["dump", f"{label(source)}-in-{label(run)}"]]
        work(tmp_path, run, commands, optimizer=optimizer)
        for source in MATRIX:
            assert_close(read(tmp_path, f"{label(source)}-in-{label(run)}"), expected)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_offloaded_moments_travel_and_continue_bit_for_bit(tmp_path, config):
    run, single = (config, 2), ("cpu", 1)
    save = [["train", 3], ["save", "plain"], ["dropout", 0.1], ["train", 6], ["save", "mid"], ["train", 9]]
    work(tmp_path, run, [*save, ["dump", "end"]], timeout=COMPILE_SECONDS)
    work(tmp_path, single, [["train", 3], ["save", "single"], ["load", "plain"], ["train", 6], ["dump", "in-single"]])
    work(
        tmp_path,
        run,
        [
            *[["load", "mid"], ["dropout", 0.1], ["train", 9], ["dump", "resumed"]],
            *[["dropout", 0.0], ["load", "single"], ["train", 6], ["dump", "from-single"]],
        ],
        timeout=COMPILE_SECONDS,
    )
    assert_same(read(tmp_path, "resumed"), read(tmp_path, "end"))
    assert_close(read(tmp_path, "from-single"), read(tmp_path, "in-single"))
