"""Updates from losses or gradients that are not finite, or from spikes, are left out as if they had not been tried."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import poison_worker
from tests.distributed.forked_launch import forked_launch
from tests.helpers import ROOT, environment, ragged_jsonl, tiny_checkpoint, write_recipe

BAD = {2: "loss", 4: "gradient"}
OMITTED = {step: "omit" for step in BAD}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipped")
    tiny_checkpoint(folder / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(folder / "data.jsonl", 16)
    return folder


def run(work, name, config, world, poison, expect=None, checkpoint=None, fused=False, **trainer):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 2, "train_parts": ["ln"]},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "packing": "pad", "overlong": "truncate",
        },
        "optim": {"lr_init": 1e-2, "lr_final": 1e-3, "weight_decay": 0.1},
        "trainer": {"max_steps": 6, "max_epochs": 2, "micro_batch_size": 1, "global_batch_size": 4, **trainer},
        "checkpoint": checkpoint or {},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    path = write_recipe(work / f"{name}.yaml", tree)
    forked_launch(poison_worker.main, config, world, str(path), poison, expect, fused, log=work / f"{name}.log")
    return work / name


def learned(out_dir, step=6):
    folder = out_dir / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "trainable.safetensors") | load_file(folder / "optimizer.safetensors")
    return tensors, json.loads((folder / "state.json").read_text())


def assert_learned_the_same(out_dir, expected):
    (ours, saved), (theirs, wanted) = learned(out_dir), learned(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.isfinite(value).all() for value in ours.values())
    assert saved["optimizer"]["steps"] == wanted["optimizer"]["steps"]
    assert list(saved["optimizer"]["steps"]) == ["4"]


def records(out_dir):
    timeless = ("step", "loss", "smoothed_loss", "grad_norm", "lr", "tokens", "skipped_steps", "nonfinite_steps")
    return [{key: r[key] for key in timeless} for r in json.loads((out_dir / "loss_data.json").read_text())]


# (strategy, processes, fused optimizer, precision)
STRATEGIES = [
    ("cpu", 1, True, "32-true"),
    ("ddp", 2, False, "32-true"),
    ("fsdp2", 2, True, "32-true"),
    ("zero2", 2, False, "bf16-true"),
    ("zero3", 2, False, "32-true"),
    pytest.param("zero1", 2, False, "32-true", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("config", "world", "fused", "precision"), STRATEGIES)
def test_skipped_is_as_if_not_tried(work, config, world, fused, precision):
    options = {"fused": fused, "precision": precision}
    out_dir = run(work, f"bad-{config}", config, world, BAD, **options)
    assert_learned_the_same(out_dir, run(work, f"omitted-{config}", config, world, OMITTED, **options))
    seen = records(out_dir)
    assert [r["step"] for r in seen if r["skipped_steps"]] == [2, 4]
    assert [r["nonfinite_steps"] for r in seen] == [0, 1, 1, 2, 2, 2]
    assert [r["loss"] is None for r in seen] == [False, True, False, False, False, False]
    assert [r["grad_norm"] is None for r in seen] == [False, True, False, True, False, False]
    health = learned(out_dir)[1]["state"]["health"]
    assert (health["nonfinite_steps"], health["nonfinite_in_row"]) == (2, 0)
    left = json.loads((out_dir / "nonfinite" / "step-00000002.json").read_text())
    assert (left["reason"], left["loss"]) == ("not finite", None)
    first = left["batches"][0]
    assert (first["rank"], first["micro_batch"], first["loss_sum"]) == (world - 1, 0, None)
    assert len({row for batch in left["batches"] for row in batch["rows"]}) == 4
    assert all(batch["loss_sum"] is not None for batch in left["batches"][1:])
    assert sorted(p.name for p in (out_dir / "nonfinite").iterdir()) == ["step-00000002.json", "step-00000004.json"]


def test_counts_and_records_continue_from_a_checkpoint_between_records(work):
    whole = run(work, "whole", "cpu", 1, BAD, checkpoint={"every_n_steps": 2, "keep_last": 9}, log_every_n_steps=4)
    assert [r["skipped_steps"] for r in records(whole)] == [2, 0]
    shutil.copytree(whole, work / "part")
    for folder in (work / "part" / "checkpoints").iterdir():
        if folder.name != "step-00000002":  # its last update was skipped, and is in no record yet
            shutil.rmtree(folder)
    part = run(work, "part", "cpu", 1, BAD, checkpoint={"every_n_steps": 2, "keep_last": 9}, log_every_n_steps=4)
    assert "step 2 of 6" in (work / "part.log").read_text()
    assert records(part) == records(whole)
    assert learned(part)[1]["state"] == learned(whole)[1]["state"]
    assert_learned_the_same(part, whole)


def test_too_many_in_a_row_end_the_run(work):
    poison = {1: "loss", 3: "gradient", 4: "loss", 5: "gradient"}
    out_dir = run(work, "row", "ddp", 2, poison, expect="3 updates in a row, up to step 5", max_nonfinite_steps=3)
    assert records(out_dir)[-1]["nonfinite_steps"] == 4
    assert "given up after step 5: 3 updates in a row were not finite" in (out_dir / "train_log.txt").read_text()
    # The epoch ended at step 4, with two of the three behind it: a new start counts on from there.
    assert [p.name for p in (out_dir / "checkpoints").iterdir()] == ["step-00000004"]
    run(work, "row", "ddp", 2, poison, expect="3 updates in a row, up to step 5", max_nonfinite_steps=3)
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_accel.data", "preview", str(out_dir / "run.yaml"),
         "--batch", str(out_dir / "nonfinite" / "step-00000005.json")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = json.loads((out_dir / "nonfinite" / "step-00000005.json").read_text())
    rows = {row for batch in left["batches"] for row in batch["rows"]}
    shown = re.findall(r"data.jsonl:(\d+): \d+ tokens", done.stdout)
    assert len(rows) == 4
    assert sorted(map(int, shown)) == sorted(row + 1 for row in rows)  # one document per row, one per line


def test_spike_is_skipped_and_told(work):
    out_dir = run(work, "spike", "ddp", 2, {5: "spike"}, spike_guard_factor=2.0)
    saved = learned(out_dir)[1]
    assert saved["state"]["health"]["spike_steps"] == 1
    assert list(saved["optimizer"]["steps"]) == ["5"]
    assert [r["skipped_steps"] for r in records(out_dir)] == [0, 0, 0, 0, 1, 0]
    assert (out_dir / "spikes" / "step-00000005.json").is_file()
    unguarded = run(work, "unguarded", "ddp", 2, {5: "spike"})
    assert [r["skipped_steps"] for r in records(unguarded)] == [0] * 6


def test_fp16_overflow_lowers_the_scale_and_continues_exactly(work):
    spoilt = {2: "gradient", 5: "loss"}
    options = {"checkpoint": {"every_n_steps": 2, "keep_last": 9}, "precision": "16-mixed", "gradient_clip_val": 0.1}
    whole = run(work, "fp16", "cpu", 1, spoilt, max_steps=8, **options)
    scales = [r["loss_scale"] for r in json.loads((whole / "loss_data.json").read_text())]
    # Halved by the overflow, doubled after three updates without one; a loss that is not finite is not its fault.
    assert [scale / 2**16 for scale in scales] == [1, 0.5, 0.5, 0.5, 0.5, 1, 1, 1]
    seen = records(whole)
    assert [r["skipped_steps"] for r in seen] == [0, 1, 0, 0, 1, 0, 0, 0]
    assert [r["nonfinite_steps"] for r in seen] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [p.name for p in (whole / "nonfinite").iterdir()] == ["step-00000005.json"]
    shutil.copytree(whole, work / "fp16-part")
    for folder in (work / "fp16-part" / "checkpoints").iterdir():
        if folder.name != "step-00000002":
            shutil.rmtree(folder)
    part = run(work, "fp16-part", "cpu", 1, spoilt, max_steps=8, **options)
    assert "step 2 of 8" in (work / "fp16-part.log").read_text()
    (ours, saved), (theirs, wanted) = learned(part, 8), learned(whole, 8)
    assert saved["state"] == wanted["state"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert records(part) == seen


@pytest.mark.parametrize(("config", "world"), [("ddp", 2), ("fsdp2", 2)])
def test_fp16_trains_like_fp32(work, config, world):
    half = run(work, f"half-{config}", config, world, {}, precision="16-mixed", gradient_clip_val=0.1)
    whole = run(work, f"single-{config}", config, world, {}, gradient_clip_val=0.1)
    for ours, theirs in zip(records(half), records(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
        assert ours["skipped_steps"] == 0


def test_fp16_is_refused_under_deepspeed(work):
    run(work, "fp16-zero", "zero2", 1, {}, expect="16-mixed is not offered under DeepSpeed", precision="16-mixed")
