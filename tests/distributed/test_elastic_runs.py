"""Whole runs that go on under another strategy and on another number of processes: the same rows, the same losses."""

import json
import shutil

import pytest

from tests.distributed import train_many
from tests.distributed.forked_launch import forked_launch
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe

STEPS, SAVED_STEP, EPOCH = 13, 3, 4  # epochs end after 4, 8 and 12 updates
LOSS_TOLERANCE = 1e-5
LAUNCHES = [
    ("cpu", 1), ("ddp", 2), ("ddp", 3), *((f"zero{stage}", world) for stage in (1, 2, 3) for world in (1, 2, 3)),
    ("fsdp2", 2), ("fsdp2", 3), ("zero2_offload", 2), ("zero3_offload", 2),
]  # fmt: skip
# Offload compiles DeepSpeed's CPU Adam once.
TIMEOUT_SECONDS = 1200


@pytest.fixture
def work(tmp_path):
    tiny_checkpoint(tmp_path / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(tmp_path / "data.jsonl", 12 * EPOCH)
    return tmp_path


def label(launch):
    return f"{launch[0]}-{launch[1]}"


def recipe(work, name):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 2, "train_parts": ["ln"]},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "optim": {"lr_init": 1e-3, "lr_final": 1e-4, "warmup_steps": 2, "weight_decay": 0.1},
        "trainer": {"max_epochs": 9, "max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 12},
        "checkpoint": {"every_n_steps": SAVED_STEP, "keep_last": 99, "epoch_save": 0},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    return str(write_recipe(work / f"{name}.yaml", tree))


def go_on(work, source, target):
    """The recipe of a run that was killed under `source` after its first checkpoint."""
    name = f"{label(source)}-in-{label(target)}"
    shutil.copytree(work / label(source), work / name)
    for checkpoint in (work / name / "checkpoints").iterdir():
        if checkpoint.name != f"step-{SAVED_STEP:08d}":
            shutil.rmtree(checkpoint)
    for rows in (work / name).glob("rows-*.json"):
        rows.unlink()
    return recipe(work, name)


def launch(work, launched, recipes):
    forked_launch(train_many.main, *launched, recipes, log=work / "log.txt", timeout=TIMEOUT_SECONDS)


def losses(out_dir):
    return {record["step"]: record["loss"] for record in json.loads((out_dir / "loss_data.json").read_text())}


def rows_by_step(out_dir):
    """The rows of each update that was made here, of all ranks together."""
    found = {}
    for file in out_dir.glob("rows-*.json"):
        for step, rows in json.loads(file.read_text()).items():
            found.setdefault(int(step), []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


def check(work, launches):
    for source in launches:
        launch(work, source, [recipe(work, label(source))])
    undisturbed = work / label(launches[0])
    wanted_rows, wanted_losses = rows_by_step(undisturbed), losses(undisturbed)
    epoch = [row for step in range(1, EPOCH + 1) for row in wanted_rows[step]]
    assert sorted(epoch) == list(range(12 * EPOCH)), "each row once in an epoch"
    assert wanted_rows[1] != wanted_rows[1 + EPOCH], "shuffled anew"
    for target in launches:
        launch(work, target, [go_on(work, source, target) for source in launches])
        for source in launches:
            out_dir = work / f"{label(source)}-in-{label(target)}"
            again = range(SAVED_STEP + 1, STEPS + 1)
            assert rows_by_step(out_dir) == {step: wanted_rows[step] for step in again}, out_dir.name
            found = losses(out_dir)
            assert list(found) == list(range(1, STEPS + 1)), out_dir.name
            for step in again:
                assert found[step] == pytest.approx(wanted_losses[step], rel=LOSS_TOLERANCE), (out_dir.name, step)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_runs_continue_anywhere(work):
    """{1, 2, 3 processes} x {one copy, ZeRO-1, 2, 3, FSDP2, offload} into each other."""
    check(work, LAUNCHES)


def test_a_run_continues_on_other_processes(work):
    """The short form."""
    check(work, [("cpu", 1), ("zero2", 2)])
