"""Keys of a recipe that reach what they name only in a whole run: one or two updates of a tiny model for each."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rwkv_accel.model import head, recompute
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.ops import wkv7 as ops
from tests.helpers import needs_compiler, ragged_jsonl


@pytest.fixture
def train(run, tmp_path):
    """Train with overrides into a folder of that name; gives the folder."""

    def call(name, *overrides):
        assert run(f"out_dir={tmp_path / name}", *overrides) == 0
        return tmp_path / name

    return call


def read(path):
    return json.loads(path.read_text())


def column(out, name):
    return [record[name] for record in read(out / "loss_data.json")]


def adapter(out):
    latest = (out / "adapter" / "LATEST").read_text().strip()
    return load_file(out / "adapter" / latest / "adapter.safetensors")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


ONE = "trainer.max_steps=1"
ASK = (ONE, "eval.every_n_steps=1")
EVAL = ("eval.split_fraction=0.2", *ASK)


def test_a_new_model_has_the_shape_and_the_seed_of_the_recipe(train, tmp_path):
    init = "model={init: {n_layer: 2, n_embd: 64, vocab_size: 300, head_size: 32, seed: 7}}"
    out = train("out", init, ONE)
    expected = generate_init_weight(RWKV7Config.for_new_model(2, 64, 300, 32), tmp_path / "expected.pth", seed=7)
    ours, theirs = torch.load(out / "rwkv-init.pth"), torch.load(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_base_is_that_of_the_recipe(train, work):
    weights = torch.load(work / "base.pth")
    torch.save({**weights, "head.weight": weights["head.weight"] * 2}, work / "other.pth")
    ours, other = train("ours", ONE), train("other", ONE, f"model.path={work / 'other.pth'}")
    assert column(ours, "loss") != column(other, "loss")


@pytest.mark.parametrize("backend", ["reference", "chunked", pytest.param("native", marks=needs_compiler)])
def test_wkv_backend_is_the_one_that_runs(train, monkeypatch, backend):
    seen = []
    for name, function in list(ops.BACKENDS.items()):
        counted = lambda *args, name=name, function=function: seen.append(name) or function(*args)  # noqa: E731
        monkeypatch.setitem(ops.BACKENDS, name, counted)
    out = train("out", f"model.wkv_backend={backend}", ONE)
    assert set(seen) == {backend}
    assert (
        f"kernels on cpu: wkv7 {backend} (asked for by name), elementwise torch" in (out / "train_log.txt").read_text()
    )


def test_dropout_changes_what_the_adapter_adds(train):
    # The adapter starts as nothing, which dropout leaves as it is.
    two = ("trainer.max_steps=2", "optim.lr_init=0.1")
    plain, dropped = (column(train(f"d{share}", f"peft.dropout={share}", *two), "loss") for share in (0.0, 0.9))
    assert plain[0] == dropped[0]
    assert plain[1] != dropped[1]


def test_accumulate_grad_batches_puts_several_micro_batches_into_an_update(train):
    plain, summed = (
        column(train("plain"), "tokens"),
        column(train("sum", "trainer.accumulate_grad_batches=5"), "tokens"),
    )
    assert len(plain) == 10
    assert summed == [sum(plain[:5]), sum(plain[5:])]


def test_gradient_clip_val_bounds_the_update(train):
    # Plain descent at a rate of 1 moves by the gradient; matrices A have none at the start.
    descent = (ONE, "optim.optimizer=sgd", "optim.lr_init=1", "optim.schedule=constant")
    whole, clipped = (train(f"clip{limit}", f"trainer.gradient_clip_val={limit}", *descent) for limit in (0, 0.001))

    def moved(out):
        return torch.cat([t.flatten() for name, t in adapter(out).items() if name.endswith("lora_B")]).norm()

    assert column(whole, "grad_norm") == column(clipped, "grad_norm")
    assert moved(whole) == pytest.approx(column(whole, "grad_norm")[0], rel=1e-5)
    assert moved(clipped) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_precision_is_that_of_the_trained_weights(train, precision, dtype):
    assert {tensor.dtype for tensor in adapter(train("out", f"trainer.precision={precision}", ONE)).values()} == {dtype}


@pytest.mark.parametrize(("mode", "calls"), [("none", 0), ("block", 1)])
def test_gradient_checkpointing_reaches_the_blocks(train, monkeypatch, mode, calls):
    seen, checkpoint = [], recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **kw: seen.append(1) or checkpoint(*args, **kw))
    train("out", f"trainer.gradient_checkpointing={mode}", ONE)
    assert len(seen) == calls


def test_l2wrap_changes_the_gradient_and_not_the_loss(train):
    without, strong = (train(f"wrap{value}", f"trainer.l2wrap={value}", ONE) for value in (0, 10))
    assert column(without, "loss") == column(strong, "loss")
    assert column(strong, "grad_norm")[0] > 1.5 * column(without, "grad_norm")[0]


def test_loss_chunk_rows_is_how_many_logits_are_made_at_a_time(train, monkeypatch):
    seen, original = [], head.linear_cross_entropy_sum

    def spy(*args, **settings):
        seen.append(settings["chunk_rows"])
        return original(*args, **settings)

    monkeypatch.setattr(head, "linear_cross_entropy_sum", spy)
    train("out", "trainer.loss_chunk_rows=5", ONE)
    assert set(seen) == {5}


def test_log_every_n_steps_leaves_steps_out(train):
    assert column(train("out", "trainer.log_every_n_steps=3"), "step") == [3, 6, 9, 10]


@pytest.mark.parametrize(("mode", "shown"), [("none", ""), ("lines", "step 1/1 "), ("bar", "1/1 |")])
def test_progress_is_shown_as_asked(train, capsys, mode, shown):
    train("out", ONE, f"tracking.progress={mode}")
    err = capsys.readouterr().err
    assert shown in err
    assert ("1/1" in err) == (mode != "none")


def test_seed_decides_on_order_and_adapter(train):
    first, again, other = (train(name, ONE, f"trainer.seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert column(first, "loss") == column(again, "loss") != column(other, "loss")
    a, b, c = (next(t for name, t in adapter(out).items() if name.endswith("lora_A")) for out in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def evaluations(out):
    return read(out / "eval_data.json")


def test_eval_path_names_the_sets(train, work):
    for number, name in enumerate(("one", "two")):
        ragged_jsonl(work / f"{name}.jsonl", 3, seed=number)
    out = train("out", *ASK, f"eval.path=[{work / 'one.jsonl'}, {work / 'two.jsonl'}]")
    assert [record["set"] for record in evaluations(out)] == ["one", "two"]


def write_tasks(work, num_examples):
    for name in ("choices", "answers"):
        rows = [
            {"prompt": f"{i}?", "answer": "a", **({"choices": ["a", "b"]} if name == "choices" else {})}
            for i in range(num_examples)
        ]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"eval.choices_path={work / 'choices.jsonl'}", f"eval.answers_path={work / 'answers.jsonl'}"


def test_choices_path_and_answers_path_are_asked(train, work):
    out = train("out", *ASK, *write_tasks(work, 3), "eval.answers_max_new_tokens=2")
    asked = {record["set"]: record for record in evaluations(out)}
    assert {name: record["examples"] for name, record in asked.items()} == {"choices": 3, "answers": 3}
    assert "exact_match" in asked["answers"]
    assert "accuracy_per_token" in asked["choices"]


def test_limit_examples_counts_in_every_file(train, work):
    ragged_jsonl(work / "long.jsonl", 6)
    ragged_jsonl(work / "short.jsonl", 2)  # the same first two
    tasks = ("eval.answers_max_new_tokens=2", "eval.limit_examples=2", *write_tasks(work, 3))
    limited = {r["set"]: r for r in evaluations(train("limited", *ASK, f"eval.path={work / 'long.jsonl'}", *tasks))}
    (short,) = evaluations(train("short", *ASK, f"eval.path={work / 'short.jsonl'}"))
    assert (limited["choices"]["examples"], limited["answers"]["examples"]) == (2, 2)
    assert limited["long"]["target_tokens"] == short["target_tokens"]


def test_eval_at_start_is_before_the_first_update(train):
    assert [record["step"] for record in evaluations(train("out", *EVAL, "eval.at_start=true"))] == [0, 1]


def test_keep_best_saves_the_best_or_not(train):
    assert (train("kept", *EVAL) / "best").is_dir()
    assert not (train("not", *EVAL, "eval.keep_best=false") / "best").exists()


def test_validation_steers_the_rate(train):
    # At a rate of nothing the loss never falls: each evaluation behind the first is one without improvement.
    still = ("eval.split_fraction=0.2", "eval.every_n_steps=1", "optim.lr_init=1e-30", "optim.schedule=constant")
    plateau = ("eval.plateau_factor=0.5", "eval.plateau_patience=0", "eval.plateau_cooldown=1")
    rates = column(train("out", *still, *plateau, "eval.plateau_min_factor=0.3", "trainer.max_steps=6"), "lr")
    assert [rate / 1e-30 for rate in rates] == pytest.approx([1, 1, 0.5, 0.5, 0.3, 0.3])


def test_epoch_save_and_keep_weights(train):
    epochs = ("trainer.max_epochs=4", "trainer.limit_train_batches=1")
    assert names(train("every", "checkpoint.epoch_save=2", *epochs) / "adapter") == ["epoch-0002", "epoch-0004"]
    kept = train("kept", "checkpoint.epoch_save=1", "checkpoint.keep_weights=2", *epochs)
    assert names(kept / "adapter") == ["epoch-0003", "epoch-0004"]


def test_checkpoints_of_a_run_are_those_that_the_recipe_keeps(train):
    often = ("checkpoint.every_n_steps=3", "checkpoint.keep_last=3", "checkpoint.keep_every_n_steps=4")
    out = train("out", *often, "trainer.max_steps=9")
    # Written after 3, 4, 6, 8 and 9.
    assert names(out / "checkpoints") == [f"step-0000000{step}" for step in (4, 6, 8, 9)]


def test_resume_takes_the_newest_the_one_named_or_none(train, run, tmp_path):
    out = train("out", ONE)
    other = train("other", f"checkpoint.resume={out / 'checkpoints' / 'step-00000001'}", "trainer.max_steps=2")
    assert column(other, "step") == [2]
    assert column(train("out", "trainer.max_steps=2"), "step") == [1, 2]
    assert run(f"out_dir={out}", "trainer.max_steps=3", "checkpoint.resume=none") == 2


def answers(out):
    return [(record["step"], record["samples"][0]) for record in read(out / "samples.json")]


def test_samples_are_drawn_as_the_recipe_says(train):
    ask = ("samples.prompts=[who]", "samples.max_new_tokens=20", "trainer.max_steps=2")
    ((step, greedy),) = answers(train("greedy", *ask))
    assert (step, greedy["prompt"]) == (2, "who")
    hot = ("samples.temperature=3.0", *ask)
    assert answers(train("hot", *hot))[0][1]["text"] != greedy["text"]
    # So small a nucleus holds the likeliest token alone.
    assert answers(train("nucleus", *hot, "samples.top_p=0.0001"))[0][1] == greedy
    assert answers(train("raw", *ask, "samples.raw=true"))[0][1]["text"] != greedy["text"]
    often = answers(train("often", *ask, "samples.every_n_steps=1", "samples.max_new_tokens=3"))
    assert [step for step, _ in often] == [1, 2]
    assert often[1][1]["text"] == greedy["text"][: len(often[1][1]["text"])]
    assert len(often[1][1]["text"]) < len(greedy["text"])
