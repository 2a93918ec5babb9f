"""A signal within training, validation or an answer: saved at once, and the rest equals the undisturbed run's."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import stop_worker
from tests.distributed.forked_launch import forked_launch
from tests.helpers import ragged_jsonl, tiny_checkpoint, write_recipe

# The validation set has 5 batches on one process and 3 on two; it is read at the start, after 2, 3 (end of the epoch),
# 4 and 6 updates. Prompts are answered after 3 and 6 updates.
STOPS = {
    ("cpu", 1): [("eval", 2, 0), ("train", 1, 0), ("eval", 7, 0), ("eval", 14, 0), ("samples", 5, 0), ("eval", 18, 0)],
    ("ddp", 2): [("eval", 5, 1), ("samples", 4, 0), ("after samples", 1, 1)],
}
CASES = [(*launch, stop) for launch, stops in STOPS.items() for stop in stops]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stop")
    tiny_checkpoint(folder / "base.pth", n_layer=1, n_embd=32, head_size=16)
    ragged_jsonl(folder / "data.jsonl", 12)
    ragged_jsonl(folder / "valid.jsonl", 10, seed=3)
    return folder


def run(work, name, config, world, stop=None, data=None, checkpoint=None):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 2, "dropout": 0.1},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "packing": "pad", "overlong": "truncate", **(data or {}),
        },
        "optim": {"lr_init": 1e-2, "schedule": "constant"},
        "trainer": {"max_epochs": 2, "micro_batch_size": 2, "global_batch_size": 4},
        "eval": {
            "path": str(work / "valid.jsonl"), "every_n_steps": 2, "at_start": True,
            "plateau_factor": 0.5, "plateau_patience": 0, "plateau_threshold": 0.2,
        },
        "samples": {"prompts": ["the river"], "every_n_steps": 3, "max_new_tokens": 8, "temperature": 1.0},
        "checkpoint": checkpoint or {},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    path = write_recipe(work / f"{name}.yaml", tree)
    forked_launch(stop_worker.main, config, world, str(path), stop, log=work / f"{name}.log")
    return work / name


@pytest.fixture(scope="module")
def undisturbed(work):
    return {launch: run(work, f"undisturbed-{launch[0]}", *launch) for launch in STOPS}


def trace(out_dir):
    """Everything that must not depend on whether the run was stopped."""
    timeless = ("step", "epoch", "loss", "smoothed_loss", "lr", "grad_norm", "target_tokens", "tokens")
    records = json.loads((out_dir / "loss_data.json").read_text())
    last = out_dir / "checkpoints" / "step-00000006"
    return {
        "losses": [{key: record[key] for key in timeless} for record in records],
        "evals": json.loads((out_dir / "eval_data.json").read_text()),
        "samples": json.loads((out_dir / "samples.json").read_text()),
        "state": json.loads((last / "state.json").read_text())["state"],
    }


@pytest.mark.parametrize(("config", "world", "stop"), CASES, ids=str)
def test_stop_anywhere_continues_bit_for_bit(work, undisturbed, config, world, stop):
    name = f"{config}-{'-'.join(map(str, stop))}".replace(" ", "-")
    out_dir = run(work, name, config, world, stop)
    assert (out_dir / "checkpoints" / "INTERRUPTED" / "manifest.json").is_file()
    run(work, name, config, world)
    expected = undisturbed[config, world]
    assert trace(out_dir) == trace(expected)
    assert [record["step"] for record in trace(out_dir)["evals"]] == [0, 2, 3, 4, 6]
    ours, theirs = (load_file(d / "adapter" / "epoch-0002" / "adapter.safetensors") for d in (out_dir, expected))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_stop_while_tokenising_leaves_nothing_behind(work):
    cache = work / "cache"
    out_dir = run(work, "tokenising", "cpu", 1, ("data", 5, 0), data={"cache_dir": str(cache)})
    assert not (out_dir / "checkpoints").exists()
    assert "nothing was lost" in (work / "tokenising.log").read_text()
    assert (cache / "tokens").is_dir()
    assert not list(cache.glob("tokens/*"))


def test_second_signal_while_saving_ends_at_once_and_spoils_nothing(work, undisturbed):
    with pytest.raises(AssertionError, match=r"exit codes \[143\]"):
        run(work, "twice", "cpu", 1, ("train", 8, 0, "twice"), checkpoint={"background": False})
    checkpoints = sorted(p.name for p in (work / "twice" / "checkpoints").iterdir())
    assert "INTERRUPTED" not in checkpoints
    assert "step-00000003" in checkpoints
    run(work, "twice", "cpu", 1)
    assert trace(work / "twice") == trace(undisturbed["cpu", 1])
