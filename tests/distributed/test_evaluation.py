"""Validation loss: the same on 1, 2 and 3 processes, packed and padded, and equal to a sum made by hand."""

import json
import math

import pytest
import torch

from tests.helpers import launch, ragged_jsonl, tiny_checkpoint, train_cli, write_recipe


def tree(work, **changes):
    base = {
        "out_dir": str(work / "out"),
        "model": {"path": str(work / "base.pth")},
        "data": {
            "path": str(work / "train.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 96, "packing": "pack", "overlong": "truncate",
        },
        "trainer": {"micro_batch_size": 3},
        "eval": {"path": str(work / "valid.jsonl")},
        "tracking": {"progress": "none"},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        base[section] = {**base.get(section, {}), name: value} if name else value
    return base


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    tiny_checkpoint(folder / "base.pth")
    ragged_jsonl(folder / "train.jsonl", 40)
    ragged_jsonl(folder / "valid.jsonl", 17, seed=5)
    for packing in ("pack", "pad"):
        write_recipe(folder / f"{packing}.yaml", tree(folder, data__packing=packing))
    return folder


def by_hand(work):
    """(loss, targets, bytes): one document after the other through the plain logits."""
    from rwkv_accel.model.io import load_model
    from rwkv_accel.model.precision import Precision

    model = load_model(work / "base.pth", Precision.from_name("32-true")).double()
    model.compute_dtype = torch.float64
    loss, targets, size = 0.0, 0, 0
    for line in (work / "valid.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = f"User: {row['q']}\n\nAssistant:".encode()
        reply = f" {row['a']}".encode()
        ids = [byte + 1 for byte in prompt + reply] + [0]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))
        scores = logits.log_softmax(-1)[0]
        wanted = range(len(prompt) - 1, len(ids) - 1)
        loss -= sum(scores[t, ids[t + 1]].item() for t in wanted)
        targets += len(wanted)
        size += len(reply)
    return loss / targets, targets, size


@pytest.mark.parametrize(("config", "world"), [("cpu", 1), ("ddp", 2), ("ddp", 3)])
def test_same_loss_on_any_number_of_processes(work, config, world):
    out = work / f"{world}.json"
    launch(config, world, "tests/distributed/eval_worker.py", work / "pack.yaml", work / "pad.yaml", out)
    loss, targets, size = by_hand(work)
    for got_loss, got_targets, got_bytes, bits in json.loads(out.read_text()):
        assert (got_targets, got_bytes) == (targets, size)
        assert got_loss == pytest.approx(loss, rel=1e-6)
        assert bits == pytest.approx(loss * targets / math.log(2) / size, rel=1e-6)


def evals(out_dir):
    return json.loads((out_dir / "eval_data.json").read_text())


def test_loop_evaluates_keeps_the_best_and_stops_early(work):
    recipe = tree(
        work,
        out_dir=str(work / "loop"),
        peft={"method": "lora", "rank": 4},
        # The rate is far too high, so that the loss soon rises.
        optim={"lr_init": 0.3, "schedule": "constant"},
        trainer={"max_epochs": 30, "micro_batch_size": 4},
        eval={
            "split_fraction": 0.25, "every_n_epochs": 1, "at_start": True, "early_stop_patience": 1,
            "early_stop_min_delta": 0.2, "plateau_factor": 0.5, "plateau_patience": 0, "plateau_threshold": 0.3,
        },
        checkpoint={"epoch_save": 1},
    )  # fmt: skip
    done = train_cli(write_recipe(work / "loop.yaml", recipe))
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in evals(work / "loop")]
    best, mark, without_gain = min(losses), math.inf, []
    for loss in losses:
        gained = loss < mark - 0.2
        mark = loss if gained else mark
        without_gain.append(0 if gained else (without_gain[-1] + 1 if without_gain else 1))
    assert len(losses) < 31
    assert without_gain.index(2) == len(losses) - 1
    assert "stopping early" in done.stdout + done.stderr
    meta = json.loads((work / "loop" / "best" / "adapter.json").read_text())
    assert meta["step"] == evals(work / "loop")[losses.index(best)]["step"]
    rates = [record["lr"] for record in json.loads((work / "loop" / "loss_data.json").read_text())]
    assert rates[0] == 0.3
    assert min(rates) < 0.3
    again = train_cli(work / "loop.yaml")
    assert again.returncode == 0, again.stderr
    assert [record["loss"] for record in evals(work / "loop")] == losses


def test_split_is_disjoint_complete_and_stable():
    import numpy as np

    from rwkv_accel.data.packing import Subset

    for size, share in ((10, 0.1), (1000, 0.25), (7, 0.01)):
        held, kept = (Subset(share, 3, side).chosen(size) for side in (True, False))
        assert (held ^ kept).all()
        assert held.sum() == max(1, round(share * size))
        assert (held == Subset(share, 3, True).chosen(size)).all()
    assert not np.array_equal(Subset(0.25, 3, True).chosen(1000), Subset(0.25, 4, True).chosen(1000))
