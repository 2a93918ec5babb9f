"""The folder on disk survives a kill at any moment, and any damage to it is found and named."""

import json
import logging
import os
import resource
import shutil
import signal

import pytest
import torch

from rwkv_accel.checkpoint import format as checkpoint_format
from rwkv_accel.checkpoint.format import (
    MANIFEST_FILE,
    STATE_FILE,
    TRAINABLE_FILE,
    CheckpointWriteError,
    DamagedCheckpoint,
    TensorFile,
    list_complete,
    validate,
)
from rwkv_accel.checkpoint.resume import find_resume
from rwkv_accel.checkpoint.retention import prune
from rwkv_accel.errors import UserError
from tests.unit.checkpoint.checkpoint_helpers import write_simple


def run_killed_at(operation: int, action) -> bool:
    """Run the action in a child that kills itself before its n-th operation on the disk; True if it was killed."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counting(function):
            def counted(*args, **kwargs):
                nonlocal count
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return counted

        os.replace, os.fsync = counting(os.replace), counting(os.fsync)
        checkpoint_format.save_file = counting(checkpoint_format.save_file)
        shutil.rmtree = counting(shutil.rmtree)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("name", ["step-00000002", "step-00000001"], ids=["new name", "same name"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path, caplog, name):
    kills = 0
    for operation in range(1, 40):
        out_dir = tmp_path / str(operation)
        write_simple(out_dir / "checkpoints" / "step-00000001", 1, value=1.0)
        target = out_dir / "checkpoints" / name
        if not run_killed_at(operation, lambda target=target: write_simple(target, 2, value=2.0)):
            break
        kills += 1
        found = find_resume(out_dir, "auto")
        value = TensorFile(found, TRAINABLE_FILE)["w"][0, 0].item()
        assert value == {1: 1.0, 2: 2.0}[validate(found, deep=True).step]
        # A leftover must not get in the way of the next save.
        write_simple(target, 3, value=3.0)
        assert validate(find_resume(out_dir, "auto"), deep=True).step == 3
    assert kills >= 8
    assert "damaged" not in caplog.text, "a killed save must not look like damage"


def test_everything_is_on_disk_before_the_final_name_appears(tmp_path, monkeypatch):
    synced, at_rename = [], []
    real_sync, real_replace = checkpoint_format.sync, os.replace
    monkeypatch.setattr(checkpoint_format, "sync", lambda path: (synced.append(path.name), real_sync(path)))

    def replace(source, target):
        at_rename.extend(synced)
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_simple(tmp_path / "checkpoints" / "step-1", 1)
    assert at_rename == [TRAINABLE_FILE, STATE_FILE, MANIFEST_FILE, "step-1.tmp"]
    assert synced[4:] == ["checkpoints"]


@pytest.mark.parametrize("file", [TRAINABLE_FILE, STATE_FILE])
def test_a_flipped_byte_is_found_and_named(tmp_path, file):
    folder = write_simple(tmp_path / "step-1", 1)
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=f"{file} do not fit its checksum"):
        validate(folder, deep=True)


def test_a_truncated_file_is_found_without_reading_it(tmp_path):
    folder = write_simple(tmp_path / "step-1", 1)
    size = (folder / TRAINABLE_FILE).stat().st_size
    os.truncate(folder / TRAINABLE_FILE, size - 1)
    with pytest.raises(DamagedCheckpoint, match=f"{TRAINABLE_FILE} has {size - 1} bytes instead of {size}"):
        validate(folder, deep=False)


def test_a_missing_file_is_named(tmp_path):
    folder = write_simple(tmp_path / "step-1", 1)
    (folder / TRAINABLE_FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{TRAINABLE_FILE} is missing"):
        validate(folder, deep=False)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "manifest.json is not readable"),
        ('{"format": "other"}', "not a checkpoint of this trainer"),
        ("[1]", "manifest.json is not readable"),
        ('{"format": "rwkv_accel-checkpoint", "version": 1}', "manifest.json is not readable"),
    ],
)
def test_a_foreign_or_broken_manifest_is_damage(tmp_path, manifest, message):
    folder = write_simple(tmp_path / "step-1", 1)
    (folder / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(DamagedCheckpoint, match=message):
        validate(folder, deep=False)


def test_a_folder_without_manifest_is_refused(tmp_path):
    (tmp_path / "pytorch_model").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"no manifest\.json"):
        validate(tmp_path / "pytorch_model", deep=True)


def test_a_newer_format_is_not_mistaken_for_damage(tmp_path):
    # Skipping it would silently throw the newest work away.
    old = write_simple(tmp_path / "checkpoints" / "step-1", 1)
    new = write_simple(tmp_path / "checkpoints" / "step-2", 2)
    content = json.loads((new / MANIFEST_FILE).read_text())
    (new / MANIFEST_FILE).write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        find_resume(tmp_path, "auto")
    assert find_resume(tmp_path, str(old)) == old


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path):
    old = write_simple(tmp_path / "checkpoints" / "step-1", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # any larger file fails as on a full disk
    try:
        with pytest.raises(CheckpointWriteError, match=r"step-2 could not be written: .*free some space"):
            write_simple(tmp_path / "checkpoints" / "step-2", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert validate(old, deep=True).step == 1


def test_a_folder_that_cannot_be_created_is_one_clear_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointWriteError, match="checkpoints/step-1 could not be written: File exists"):
        write_simple(tmp_path / "checkpoints" / "step-1", 1)


def test_tensors_come_back_bit_for_bit_whatever_their_memory_layout(tmp_path):
    values = {
        "transposed": torch.randn(5, 3).T,
        "bf16": torch.randn(4).bfloat16(),
        "negative zero": torch.tensor([-0.0, float("nan"), float("inf")]),
    }
    checkpoint_format.write_folder(tmp_path / "a", step=0, tensors={TRAINABLE_FILE: values}, documents={})
    read = TensorFile(tmp_path / "a", TRAINABLE_FILE)
    for name, value in values.items():
        assert read[name].dtype == value.dtype
        assert read.shape(name) == value.shape
        as_int = torch.int16 if value.dtype == torch.bfloat16 else torch.int32
        assert torch.equal(read[name].view(as_int), value.contiguous().view(as_int))


def test_order_is_that_of_writing_not_of_steps_or_clocks(tmp_path):
    for name, step in [("step-5", 5), ("step-9", 9), ("step-6", 6)]:
        write_simple(tmp_path / name, step)
    os.utime(tmp_path / "step-6", (0, 0))
    assert [folder.name for folder, _ in list_complete(tmp_path)] == ["step-5", "step-9", "step-6"]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("trainer_state.json", "a checkpoint of the Hugging Face Trainer"),
        ("global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "a checkpoint of DeepSpeed"),
        ("epoch=1-step=7.ckpt", "a checkpoint of Lightning"),
        (".metadata", "a checkpoint of torch.distributed.checkpoint"),
        ("adapter_config.json", "an adapter of HF peft"),
        ("model.safetensors", "a folder of bare weights"),
    ],
)
def test_a_foreign_checkpoint_is_named_skipped_and_never_removed(tmp_path, caplog, file, kind):
    foreign = tmp_path / "checkpoints" / "checkpoint-500"
    (foreign / file).parent.mkdir(parents=True)
    (foreign / file).write_text("theirs")
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint-500 is {kind}, .*give model.path"):
        validate(foreign, deep=True)
    with pytest.raises(UserError, match=f"no usable checkpoint: .*{kind}.*another out_dir"):
        find_resume(tmp_path, "auto")
    for step in (1, 2, 3):
        ours = write_simple(tmp_path / "checkpoints" / f"step-{step}", step)
    prune(tmp_path / "checkpoints", keep_last=1)
    with caplog.at_level(logging.WARNING):
        assert find_resume(tmp_path, "auto") == ours
    assert f"checkpoint-500 is {kind}" in caplog.text
    assert (foreign / file).read_text() == "theirs"


def test_our_own_without_its_manifest_is_not_foreign(tmp_path):
    folder = write_simple(tmp_path / "step-1", 1)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-1 has no manifest\.json: it is not a complete checkpoint"):
        validate(folder, deep=True)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "rwkv-5.pth").write_text("weights")
    with pytest.raises(UserError, match=r"rwkv-5\.pth is a file, .*is a folder; to start a new run from weights give"):
        find_resume(tmp_path, str(tmp_path / "rwkv-5.pth"))
