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


def test_full_disk_in_the_middle_of_a_run(tmp_path, small_disk):
    tiny_checkpoint(tmp_path / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(tmp_path / "data.jsonl", 16)
    tree = {
        "out_dir": str(small_disk / "run"),
        "model": {"path": str(tmp_path / "base.pth")},
        "peft": {"method": "lora", "rank": 4},
        "data": {
            "path": str(tmp_path / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "packing": "pad", "overlong": "truncate",
        },
        "trainer": {"max_steps": 6, "max_epochs": 2, "micro_batch_size": 4},
        "checkpoint": {"every_n_steps": 1, "background": False},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    recipe, log, seen = write_recipe(tmp_path / "r.yaml", tree), tmp_path / "log", tmp_path / "seen"
    forked_launch(disk_worker.main, "cpu", 1, str(recipe), str(small_disk), str(seen), log=log)
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
