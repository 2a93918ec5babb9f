"""Checkpoints written behind the training: never changed by later steps, never two at a time, failures told."""

import json
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from rwkv_accel.checkpoint import CheckpointWriteError, CheckpointWriter, find_resume, save_checkpoint
from rwkv_accel.checkpoint import writer as writer_module
from rwkv_accel.checkpoint.format import OPTIMIZER_FILE, TRAINABLE_FILE, validate, write_folder
from rwkv_accel.config.checkpoint import CheckpointConfig
from tests.unit.checkpoint.checkpoint_helpers import train

WAIT_SECONDS = 60


class Gate:
    """write_folder that stops before it writes, until it is let go."""

    def __init__(self, monkeypatch):
        self.entered, self.open, self.names, self.thread = threading.Event(), threading.Event(), [], None
        monkeypatch.setattr(writer_module, "write_folder", self)

    def __call__(self, final, **content):
        self.names.append(final.name)
        self.thread = threading.current_thread()
        self.entered.set()
        assert self.open.wait(WAIT_SECONDS)
        write_folder(final, **content)


def save(accelerator, run, writer, name, step, **more):
    return save_checkpoint(
        accelerator, *run, {"step": step}, writer=writer, name=name, config={}, base_digest=None, **more
    )


def test_the_training_goes_on_while_the_disk_works_and_does_not_change_what_is_written(
    tmp_path, accelerator, make_run, monkeypatch
):
    gate = Gate(monkeypatch)
    model, optimizer = make_run()
    train(model, optimizer, 3)
    state = optimizer.optimizer.state
    expected = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    moments = {f"exp_avg/{n}": state[p]["exp_avg"].clone() for n, p in model.named_parameters() if p in state}
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    residual, unlogged = torch.ones(3), [[1.0]]
    folder = save(
        accelerator, (model, optimizer), writer, "step-3", 3, extra={"rows": unlogged}, extra_tensors={"r": residual}
    )
    assert gate.entered.wait(WAIT_SECONDS)
    assert not folder.exists()
    train(model, optimizer, 5)
    residual.zero_()
    unlogged += [[2.0]]
    assert not torch.equal(model.lora_A, expected["lora_A"]), "the training went on"
    gate.open.set()
    writer.finish(accelerator)
    assert validate(folder, deep=True).step == 3
    found = load_file(folder / TRAINABLE_FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    found = load_file(folder / OPTIMIZER_FILE)
    assert moments
    assert all(torch.equal(found[name], value) for name, value in moments.items())
    assert torch.equal(load_file(folder / "extra.safetensors")["r"], torch.ones(3))
    assert json.loads((folder / "state.json").read_text())["extra"] == {"rows": [[1.0]]}


def test_the_next_checkpoint_waits_for_the_one_in_flight(tmp_path, accelerator, make_run, monkeypatch):
    gate, run = Gate(monkeypatch), make_run()
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    save(accelerator, run, writer, "step-1", 1)
    assert gate.entered.wait(WAIT_SECONDS)
    second = threading.Thread(target=save, args=(accelerator, run, writer, "step-2", 2))
    second.start()
    second.join(0.1)
    assert gate.names == ["step-1"]
    gate.open.set()
    second.join(WAIT_SECONDS)
    writer.finish(accelerator)
    assert gate.names == ["step-1", "step-2"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("background", [True, False])
def test_in_the_foreground_it_is_on_disk_at_once(tmp_path, accelerator, make_run, monkeypatch, background):
    gate = Gate(monkeypatch)
    if not background:
        gate.open.set()
    writer = CheckpointWriter(tmp_path, CheckpointConfig(background=background))
    folder = save(accelerator, make_run(), writer, "step-1", 1)
    assert folder.exists() is not background
    gate.open.set()
    writer.finish(accelerator)
    assert folder.exists()


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_is_told_once_and_the_next_one_succeeds(tmp_path, accelerator, make_run, background):
    run, checkpoints = make_run(), tmp_path / "checkpoints"
    writer = CheckpointWriter(tmp_path, CheckpointConfig(background=background))
    save(accelerator, run, writer, "step-1", 1)
    writer.finish(accelerator)
    os.rename(checkpoints, tmp_path / "aside")
    checkpoints.write_text("a file in the way")
    save(accelerator, run, writer, "step-2", 2)
    with pytest.raises(CheckpointWriteError, match="step-2 could not be written"):
        writer.finish(accelerator)
    checkpoints.unlink()
    os.rename(tmp_path / "aside", checkpoints)
    save(accelerator, run, writer, "step-3", 3)
    (failure,) = writer.take_failures()
    assert "step-2 could not be written: File exists" in str(failure)
    writer.finish(accelerator)
    assert writer.take_failures() == []
    assert find_resume(tmp_path, "auto").name == "step-3"


def test_a_folder_that_cannot_be_tidied_up_is_told_and_the_checkpoint_counts(
    tmp_path, accelerator, make_run, monkeypatch
):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer_module, "prune", refuse)
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    folder = save(accelerator, make_run(), writer, "step-1", 1)
    writer.finish(accelerator)
    (failure,) = writer.take_failures()
    assert "checkpoints cannot be tidied up: [Errno 13] Permission denied" in str(failure)
    assert validate(folder, deep=True).step == 1


def test_a_defect_in_the_thread_is_not_swallowed(tmp_path, accelerator, make_run, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(writer_module, "write_folder", broken)
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    save(accelerator, make_run(), writer, "step-1", 1)
    with pytest.raises(ZeroDivisionError):
        writer.finish(accelerator)


def test_retention_is_that_of_the_recipe(tmp_path, accelerator, make_run):
    run = make_run()
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep_last=1, keep_every_n_steps=20))
    for step in (10, 20, 30, 40, 50, 60):
        name = "INTERRUPTED" if step == 40 else f"step-{step:08d}"
        save(accelerator, run, writer, name, step)
    writer.finish(accelerator)
    # 20 and 60 are multiples; what a signal left at 40 is not kept for good.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000060"]
