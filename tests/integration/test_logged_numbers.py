"""The numbers of loss_data.json against a count and a computation that share no code with the trainer."""

import json
from itertools import pairwise

import pytest
import torch

from tests.helpers import ragged_jsonl, tiny_checkpoint, train_cli, write_recipe
from tests.plain_rwkv7 import document_loss

BATCH, NUM_DOCUMENTS, RATE, CLIP = 4, 14, 0.05, 0.5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    tiny_checkpoint(folder / "base.pth", n_embd=32, head_size=16)
    ragged_jsonl(folder / "data.jsonl", NUM_DOCUMENTS)
    return folder


def documents(work):
    """(ids, is target) of each document: a byte's id is its value + 1, end of text is 0."""
    found = []
    for line in (work / "data.jsonl").read_text().splitlines():
        pair = json.loads(line)
        prompt, reply = f"User: {pair['q']}\n\nAssistant:".encode(), f" {pair['a']}".encode()
        ids = [byte + 1 for byte in prompt + reply] + [0]
        found.append((ids, [False] * len(prompt) + [True] * (len(reply) + 1)))
    return found


def train(work, name, **changes):
    """Records of a run over the documents."""
    tree = {
        "out_dir": str(work / name),
        "model": {"path": str(work / "base.pth")},
        "peft": {"method": "full"},
        "data": {
            "path": str(work / "data.jsonl"), "prompt_column": "q", "response_column": "a", "tokenizer": "byte",
            "ctx_len": 128, **changes.pop("data", {}),
        },
        "optim": {"optimizer": "sgd", "lr_init": RATE, "lr_scale": {"w0": 1.0}, **changes.pop("optim", {})},
        "trainer": {
            "max_epochs": 2, "micro_batch_size": 2, "global_batch_size": BATCH, "gradient_clip_val": CLIP,
            "l2wrap": 0.0, **changes.pop("trainer", {}),
        },
        "tracking": {"progress": "none"},
    }  # fmt: skip
    done = train_cli(write_recipe(work / f"{name}.yaml", tree))
    assert done.returncode == 0, done.stderr
    return json.loads((work / name / "loss_data.json").read_text())


@pytest.fixture(scope="module")
def records(work):
    return train(work, "replayed", data={"packing": "pad", "shuffle": False})


def test_losses_and_gradient_norms_equal_a_replay_in_plain_torch(work, records):
    """Every update is made again in float64, document by document, with gradients of autograd."""
    weights = {name: tensor.double().requires_grad_() for name, tensor in torch.load(work / "base.pth").items()}
    unused = {name for name in weights if name.startswith("blocks.0.att.v") and name[-2:] in ("v0", "v1", "v2")}
    trained = [tensor for name, tensor in weights.items() if name not in unused]
    per_epoch = [documents(work)[start : start + BATCH] for start in range(0, NUM_DOCUMENTS, BATCH)]
    assert len(records) == 2 * len(per_epoch)
    assert len(per_epoch[-1]) < BATCH, "the last update of an epoch is a short one"
    for record, batch in zip(records, per_epoch * 2):
        loss = sum(document_loss(weights, *document) for document in batch)
        loss = loss / sum(sum(is_target[1:]) for _, is_target in batch)
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-6), record["step"]
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        with torch.no_grad():
            for tensor, gradient in zip(trained, gradients):
                tensor -= RATE * gradient * min(1.0, CLIP / (norm + 1e-6))
    assert records[0]["loss"] - records[-1]["loss"] > 0.01, "the replay followed weights that change"


def test_tokens_equal_a_count_of_the_data(work, records):
    found = documents(work)
    for record, start in zip(records, [*range(0, NUM_DOCUMENTS, BATCH)] * 2):
        batch = found[start : start + BATCH]
        assert record["tokens"] == sum(len(ids) - 1 for ids, _ in batch), record["step"]
        assert record["target_tokens"] == sum(sum(is_target[1:]) for _, is_target in batch), record["step"]


def test_speed_is_that_count_over_the_time(records):
    per_epoch = len(records) // 2
    checked = 0
    for before, record in pairwise(records):
        if before["step"] % per_epoch == 0 or before["step"] == 1:
            continue  # a save, or the start of the trackers, lies between the two
        seconds = record["wall_seconds"] - before["wall_seconds"]
        assert record["kt_s"] == pytest.approx(record["tokens"] / seconds / 1000, rel=1e-6)
        assert record["target_kt_s"] == pytest.approx(record["target_tokens"] / seconds / 1000, rel=1e-6)
        assert record["it_s"] == pytest.approx(1 / seconds, rel=1e-6)
        checked += 1
    assert checked == 2 * (per_epoch - 1) - 1


def test_the_run_leaves_its_report(work, records):
    text = (work / "replayed" / "report.html").read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    (run,) = data["runs"]
    assert run["columns"]["loss"] == pytest.approx([record["loss"] for record in records], rel=1e-6)
    assert (run["summary"]["status"], run["summary"]["layers"], run["summary"]["method"]) == ("finished", "2", "full")


def test_packed_and_shuffled_epochs_have_the_mean_of_all_documents(work):
    """Each update takes the whole data at a rate of 0: its loss is the mean over every target, whatever the packing."""
    records = train(
        work, "frozen", optim={"lr_init": 0.0}, data={"packing": "pack"},
        trainer={"global_batch_size": 100, "micro_batch_size": 1, "max_epochs": 3},
    )  # fmt: skip
    found = documents(work)
    weights = {name: tensor.double() for name, tensor in torch.load(work / "base.pth").items()}
    targets = sum(sum(is_target[1:]) for _, is_target in found)
    loss = sum(document_loss(weights, *document).item() for document in found) / targets
    assert [record["loss"] for record in records] == pytest.approx([loss] * 3, rel=1e-6)
    assert [record["target_tokens"] for record in records] == [targets] * 3
    assert [record["tokens"] for record in records] == [sum(len(ids) - 1 for ids, _ in found)] * 3
