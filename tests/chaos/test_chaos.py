"""Nothing is lost: a run that is killed at random moments ends bit for bit where the undisturbed run does.

    python -m pytest -m chaos tests/chaos

The real command under the real launcher, started again after each blow without waiting for what the last one left
behind. CHAOS_SEED chooses other moments. Cannot prove anything about a power cut's effect on a disk's own cache.
"""

import json
import os
import signal

import pytest
import torch

from tests.chaos.chaos import PHASES, ChaosRun, Kill, plan
from tests.helpers import launch, ragged_jsonl, tiny_checkpoint, write_recipe

SEED = int(os.environ.get("CHAOS_SEED", "1"))
NUM_KILLS = 24
STRATEGIES = {"cpu": (1, 5.0), "ddp": (2, 6.5), "zero2": (2, 8.0)}
"""Processes, and about how many seconds a start takes: kills at start-up fall within them."""
TIMELESS = ("step", "epoch", "loss", "smoothed_loss", "lr", "weight_decay", "grad_norm", "target_tokens", "tokens")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl", 20)
    # Long enough to be hit on a busy machine.
    ragged_jsonl(folder / "eval.jsonl", 40, seed=1)
    return folder


def recipe(work, name, max_steps):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 4, "dropout": 0.1, "train_parts": ["ln"]},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 48, "packing": "pad", "overlong": "truncate",
        },
        "optim": {"lr_init": 1e-2, "lr_final": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
        # Two or more micro-batches per process, and a short window at the end of each epoch.
        "trainer": {"max_epochs": 1000, "max_steps": max_steps, "micro_batch_size": 1, "global_batch_size": 6},
        "eval": {
            "path": str(work / "eval.jsonl"), "every_n_steps": 3, "at_start": True, "plateau_factor": 0.9,
            "plateau_patience": 1,
        },
        "samples": {"every_n_steps": 5, "prompts": ["the river", "old mills"], "max_new_tokens": 12},
        "checkpoint": {"every_n_steps": 2, "epoch_save": 3},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    return write_recipe(work / f"{name}.yaml", tree)


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def outcome(out_dir):
    """Everything that a run computed, without times."""
    read = {name: json.loads((out_dir / f"{name}.json").read_text()) for name in ("loss_data", "eval_data", "samples")}
    read["loss_data"] = [{key: record[key] for key in TIMELESS} for record in read["loss_data"]]
    saved = sorted((out_dir / "checkpoints").glob("step-*"))[-1]
    adapter = (out_dir / "adapter" / "LATEST").read_text().strip()
    state = json.loads((saved / "state.json").read_text())
    read["state"] = {**state["state"], "step_of_newest": saved.name, "adapter": adapter}
    read["rng"] = json.loads((saved / "rng.json").read_text())
    files = {
        "weights": out_dir / "adapter" / adapter / "adapter.safetensors",
        "best": out_dir / "best" / "adapter.safetensors",
        "trained": saved / "trainable.safetensors",
        "moments": saved / "optimizer.safetensors",
    }
    return read, {name: tensors(path) for name, path in files.items()}


def assert_same_end(ours, theirs):
    (our_records, our_tensors), (their_records, their_tensors) = outcome(ours), outcome(theirs)
    for name, wanted in their_records.items():
        assert our_records[name] == wanted, name
    for name, wanted in their_tensors.items():
        assert our_tensors[name].keys() == wanted.keys()
        unequal = [key for key in wanted if not torch.equal(our_tensors[name][key], wanted[key])]
        assert not unequal, (name, unequal)


def run_both(work, config, kills, max_steps, capsys):
    processes, _ = STRATEGIES[config]
    calm = recipe(work, f"{config}-calm-{max_steps}", max_steps)
    launch(config, processes, "-m", "rwkv_accel.train", calm)
    name = f"{config}-chaos-{max_steps}"
    folder = work / f"{name}-logs"
    folder.mkdir()
    chaos = ChaosRun(config, processes, recipe(work, name, max_steps), folder, SEED)
    try:
        chaos.suffer(kills)
        chaos.finish()
    finally:
        for process in chaos.processes():
            process.kill()
        with capsys.disabled():
            print(f"\n{config} x {processes}: {chaos.summary()}")
    steps = [record["step"] for record in json.loads((work / name / "loss_data.json").read_text())]
    assert steps == list(range(1, max_steps + 1))
    assert_same_end(work / name, work / f"{config}-calm-{max_steps}")
    return chaos


@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", STRATEGIES)
def test_killed_again_and_again(work, config, capsys):
    kills = plan(SEED, NUM_KILLS, STRATEGIES[config][1])
    chaos = run_both(work, config, kills, 200, capsys)
    assert sum(chaos.hits.values()) >= 20
    assert chaos.phases_hit() == set(PHASES)


def test_killed_a_few_times(work, capsys):
    """The short form: one process; a save cut off, then a launcher that dies alone and leaves its trainer behind."""
    kills = [
        Kill("save", 2, 0.004, signal.SIGKILL, "all", None),
        Kill("evaluate", 1, 0.0, signal.SIGTERM, "launcher", None),
    ]
    run_both(work, "cpu", kills, 24, capsys)
