"""A disk that fills up in the middle of a run, and has room again later: the run goes on, and nothing is spoilt."""

import json
import subprocess

import pytest

from rwkv_accel.checkpoint.format import list_complete
from tests.distributed import disk_worker
from tests.distributed.forked_launch import forked_launch
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def recipe(tmp_path):
    tiny_checkpoint(tmp_path / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(tmp_path / "data.jsonl", 16)

    def write(out_dir, **changes):
        tree = {
            "out_dir": str(out_dir),
            "model": {"path": str(tmp_path / "base.pth")},
            "peft": {"method": "lora", "rank": 4},
            "data": {
                "path": str(tmp_path / "data.jsonl"), "prompt_column": "q", "response_column": "a",
                "tokenizer": "byte", "ctx_len": 96, "packing": "pad", "overlong": "truncate",
            },
            "trainer": {"max_steps": 6, "max_epochs": 2, "micro_batch_size": 2, "global_batch_size": 4},
            "checkpoint": {"every_n_steps": 1, "background": False},
            "tracking": {"progress": "none"},
        }  # fmt: skip
        tree.update(changes)
        return write_recipe(tmp_path / f"{out_dir.name}.yaml", tree)

    return write


def losses(out_dir):
    return [(r["step"], r["loss"]) for r in json.loads((out_dir / "loss_data.json").read_text())]


def test_full_disk_in_the_middle_of_a_run(tmp_path, small_disk, recipe):
    path, log, seen = recipe(small_disk / "run"), tmp_path / "log", tmp_path / "seen"
    forked_launch(disk_worker.main, "cpu", 1, str(path), str(small_disk), str(seen), log=log)
    out_dir, said = small_disk / "run", log.read_text()
    # While it was full, what had been written before stayed, and nothing half-written beside it.
    assert seen.read_text().splitlines() == ["step-00000001", "step-00000002"]
    assert said.count("could not be written") >= 2
    assert "No space left on device" in said
    assert "adapter/epoch-0001" in said
    assert said.count("the training goes on") >= 3
    # The run reached its end, and its logs are whole.
    assert [folder.name for folder, _ in list_complete(out_dir / "checkpoints")] == ["step-00000005", "step-00000006"]
    assert [r["step"] for r in json.loads((out_dir / "loss_data.json").read_text())] == [1, 2, 3, 4, 5, 6]
    assert (out_dir / "adapter" / "LATEST").read_text().strip() == "step-00000006"
    assert "the training goes on" in (out_dir / "train_log.txt").read_text()


@pytest.mark.parametrize(
    ("where", "config", "processes", "background"),
    [("disk", "cpu", 1, True), ("writer", "cpu", 1, False), ("writer", "ddp", 2, True)],
)
def test_stopped_while_the_disk_is_full(request, tmp_path, recipe, where, config, processes, background):
    disk = request.getfixturevalue("small_disk") if where == "disk" else None
    out_dir, code, log = (disk or tmp_path) / "run", tmp_path / "code", tmp_path / "log"
    checkpoint = {"every_n_steps": 2, "background": background}
    path = recipe(out_dir, checkpoint=checkpoint)
    forked_launch(disk_worker.stopped_while_full, config, processes, str(path), disk and str(disk), str(code), log=log)
    # Not the code that asks a launcher for another start: the disk would still be full.
    assert code.read_text() == "2"
    told = [line for line in log.read_text().splitlines() if "INTERRUPTED" in line or "error" in line]
    assert told == [
        f"error: stopped by SIGTERM after step 3, but checkpoint {out_dir}/checkpoints/INTERRUPTED could not be "
        "written: No space left on device; free some space or mend the folder's permissions (checkpoints written "
        "before are intact); the same command continues from step-00000002, after step 2"
    ]
    assert "Traceback" not in log.read_text()
    assert [folder.name for folder in (out_dir / "checkpoints").iterdir()] == ["step-00000002"]
    if disk is not None:
        (disk / "ballast").unlink()
    forked_launch(disk_worker.command, config, processes, str(path), str(code), log=log)
    assert code.read_text() == "0"
    assert f"continuing from {out_dir}/checkpoints/step-00000002: step 2 of 6" in log.read_text()
    undisturbed = tmp_path / "undisturbed"
    forked_launch(disk_worker.command, config, processes, str(recipe(undisturbed)), str(code), log=log)
    assert losses(out_dir) == losses(undisturbed)
