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


def test_plateau_best_and_early_stop_go_on_across_a_resume(work):
    """Stopped after two epochs and started again, the run decides exactly what an undisturbed one decides."""
    recipe = tree(
        work,
        peft={"method": "lora", "rank": 4},
        optim={"lr_init": 0.1, "schedule": "constant"},
        trainer={"max_epochs": 12, "micro_batch_size": 4},
        eval={
            "split_fraction": 0.25, "every_n_epochs": 1, "at_start": True, "early_stop_patience": 2,
            "early_stop_min_delta": 0.5, "plateau_factor": 0.5, "plateau_patience": 1, "plateau_threshold": 0.2,
        },
        checkpoint={"epoch_save": 0},
    )  # fmt: skip
    path = write_recipe(work / "controls.yaml", recipe)
    for name, starts in (("whole", [12]), ("cut", [2, 12])):
        for epochs in starts:
            done = train_cli(path, f"out_dir={work / name}", f"trainer.max_epochs={epochs}")
            assert done.returncode == 0, done.stderr
    whole, cut = evals(work / "whole"), evals(work / "cut")
    assert whole == cut
    # The decisions span the cut: patience 2 was not used up at epoch 2, and the run ended before epoch 12.
    assert 4 <= len(whole) < 13
    logs = [json.loads((work / name / "loss_data.json").read_text()) for name in ("whole", "cut")]
    rates = [[record["lr"] for record in log] for log in logs]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    best = [json.loads((work / n / "best" / "adapter.json").read_text())["step"] for n in ("whole", "cut")]
    assert best[0] == best[1] == min(whole, key=lambda record: record["loss"])["step"]


def write_tasks(folder):
    """Prompts long enough for several passes, and answers that a regular expression finds."""
    words = [row["q"] + " " + row["a"] for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines())]
    with (folder / "choices.jsonl").open("w") as choices, (folder / "answers.jsonl").open("w") as answers:
        for number, text in enumerate(words):
            row = {"question": f"{text}, {text}?", "choices": [text[:5], text[4::-1], text[:7]], "answer": number % 2}
            choices.write(json.dumps(row) + "\n")
            if number < 5:
                answers.write(json.dumps({"prompt": text, "answer": f"so it is #### {number}"}) + "\n")


EVALUATE = ["--regex", "(.)", "--normalize", "case", "--max-new-tokens", "6", "--ctx-len", "96"]


def evaluate_command(work, config, world, out, *args):
    files = [part for kind in ("choices", "answers") for part in (f"--{kind}", work / f"{kind}.jsonl")]
    done = launch(config, world, "-m", "rwkv_accel.evaluate", *args, *files, *EVALUATE, "--json", out)
    return json.loads(out.read_text())["results"], done.stdout


OTHERS = {"ddp": [("ddp", 3)], "sharded": [("ddp", 2), ("fsdp2", 2), ("zero3", 3)]}


@pytest.mark.parametrize("config", ["ddp", pytest.param("sharded", marks=pytest.mark.long)])
def test_command_gives_the_same_numbers_on_any_number_of_processes(work, config):
    write_tasks(work)
    data = ["--data", work / "valid.jsonl", "data.prompt_column=q", "data.response_column=a", "data.overlong=truncate"]
    want, stdout = evaluate_command(work, "cpu", 1, work / "one.json", work / "base.pth", *data)
    loss, targets, size = by_hand(work)
    assert want[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert want[0]["target_tokens"] == targets
    assert want[0]["bits_per_byte"] == pytest.approx(loss * targets / math.log(2) / size, rel=1e-6)
    assert [(row["set"], row["kind"]) for row in want] == [
        ("valid", "data"), ("choices", "choices"), ("answers", "answers"),
    ]  # fmt: skip
    assert [row.get("examples") for row in want] == [None, 40, 5]
    assert [line.split()[:2] for line in stdout.splitlines()][2] == ["valid", "loss"]
    for name, world in OTHERS[config]:
        got, _ = evaluate_command(work, name, world, work / f"{name}.json", work / "base.pth", *data)
        assert got[1:] == want[1:]
        for measure in ("loss", "perplexity", "bits_per_byte", "target_tokens"):
            assert got[0][measure] == pytest.approx(want[0][measure], rel=1e-6)


def tasks_recipe(work, **eval_keys):
    return tree(
        work,
        peft={"method": "lora", "rank": 4},
        optim={"lr_init": 0.1},
        trainer={"global_batch_size": 6, "micro_batch_size": 1, "max_steps": 2},
        eval={
            "choices_path": str(work / "choices.jsonl"), "every_n_steps": 1, "every_n_epochs": None, "at_start": True,
            **eval_keys,
        },
    )  # fmt: skip


def test_loop_asks_the_task_files_and_writes_them_beside_the_loss(work):
    write_tasks(work)
    answers = {"answers_regex": "(.)", "answers_max_new_tokens": 5, "answers_batch_size": 2, "limit_examples": 20}
    files = {"path": str(work / "valid.jsonl"), "answers_path": str(work / "answers.jsonl")}
    path = write_recipe(work / "tasks.yaml", tasks_recipe(work, **files, **answers))
    found = {}
    for config, world in (("cpu", 1), ("ddp", 2)):
        launch(config, world, "-m", "rwkv_accel.train", path, f"out_dir={work / f'tasks-{config}'}")
        found[config] = evals(work / f"tasks-{config}")
    one, two = ([row for row in found[config] if row["set"] != "valid"] for config in ("cpu", "ddp"))
    assert [(row["step"], row["set"]) for row in one] == [(s, n) for s in (0, 1, 2) for n in ("choices", "answers")]
    assert len({(row["accuracy"], row["accuracy_per_token"]) for row in one[::2]}) > 1
    assert [row["examples"] for row in one[:2]] == [20, 5]
    assert one[1]["no_answer_share"] == 0.0
    assert one == two
    assert (work / "tasks-cpu" / "best").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_choices_are_scored_on_sharded_weights_and_answers_refused(work, config):
    write_tasks(work)
    path = write_recipe(work / "sharded.yaml", tasks_recipe(work))
    for name, world in (("cpu", 1), (config, 2)):
        launch(name, world, "-m", "rwkv_accel.train", path, f"out_dir={work / f'sharded-{name}'}")
    assert evals(work / f"sharded-{config}") == evals(work / "sharded-cpu")
    refused = launch(
        config, 2, "-m", "rwkv_accel.train", path, f"eval.answers_path={work / 'answers.jsonl'}", check=False
    )
    assert "error: eval.answers_path needs whole weights" in refused.stderr


def test_split_is_disjoint_complete_and_stable():
    import numpy as np

    from rwkv_accel.data.packing import Subset

    for size, share in ((10, 0.1), (1000, 0.25), (7, 0.01)):
        held, kept = (Subset(share, 3, side).chosen(size) for side in (True, False))
        assert (held ^ kept).all()
        assert held.sum() == max(1, round(share * size))
        assert (held == Subset(share, 3, True).chosen(size)).all()
    assert not np.array_equal(Subset(0.25, 3, True).chosen(1000), Subset(0.25, 4, True).chosen(1000))
