"""A run on a stream goes on where it was killed: the same rows, bit for bit, on the same number of processes."""

import json

import pytest
import torch

from tests.helpers import launch, ragged_jsonl, tiny_checkpoint, write_recipe

STEPS = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "data.jsonl", 30)
    return folder


def recipe(work, name):
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "streaming": True, "stream_block": 7,
        },
        "optim": {"lr_init": 1e-2},
        "trainer": {"max_steps": STEPS, "global_batch_size": 4},
        # Step 3 lies within a block of the second pass, and reading runs ahead of it.
        "checkpoint": {"every_n_steps": 3, "keep_last": 9},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    return write_recipe(work / f"{name}.yaml", tree)


def weights(out_dir):
    from safetensors.torch import load_file

    return load_file(out_dir / "adapter" / f"step-{STEPS:08d}" / "adapter.safetensors")


def losses(out_dir):
    return [(r["step"], r["loss"], r["tokens"]) for r in json.loads((out_dir / "loss_data.json").read_text())]


def places(out_dir):
    """The stream's place in each checkpoint."""
    found = {}
    for folder in sorted((out_dir / "checkpoints").iterdir()):
        state = json.loads((folder / "state.json").read_text())
        found[folder.name] = state.get("document", state)["extra"]["data"]
    return found


@pytest.fixture(scope="module")
def runs(work):
    def again(name, folder, step):
        return f"{work / folder}+{step}+{recipe(work, name)}"

    script = "tests/distributed/continue_many.py"
    launch("ddp", 2, script, recipe(work, "two"), again("two-from-3", "two", 3), again("two-from-6", "two", 6))
    # The second `one` is over when it starts.
    launch(
        "cpu",
        1,
        script,
        recipe(work, "one"),
        recipe(work, "one"),
        again("one-from-3", "one", 3),
        again("two-to-one", "two", 6),
    )
    return work


@pytest.mark.parametrize("name", ["two-from-3", "two-from-6", "one-from-3"])
def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(runs, name):
    undisturbed = runs / name.split("-")[0]
    ours, theirs = weights(runs / name), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert losses(runs / name) == losses(undisturbed)
    assert [step for step, _, _ in losses(undisturbed)] == list(range(1, STEPS + 1))
    assert places(runs / name) == places(undisturbed)
    assert places(undisturbed)["step-00000003"]["row"] > 0


def test_the_rows_do_not_depend_on_the_number_of_processes(runs):
    tokens = [[tokens for _, _, tokens in losses(runs / name)] for name in ("one", "two", "two-to-one")]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(tokens[0])) > 1
