"""Recipe loading: precedence, every problem at once, names of other trainers, round trip."""

import re
from pathlib import Path

import pytest

from rwkv_accel.config.load import KNOWN_ELSEWHERE, dump_config, leaf_keys, load_config
from rwkv_accel.errors import UserError

MINIMAL = "out_dir: out/x\nmodel: {path: base.pth}\ndata: {path: a.jsonl}\n"


def recipe(tmp_path, text=MINIMAL):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def problems(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_default_then_yaml_then_override(tmp_path):
    path = recipe(tmp_path, MINIMAL + "optim: {lr_init: 1e-3, warmup_steps: 7}\n")
    config = load_config(path, ["optim.warmup_steps=9", "peft.targets=[att.key]"])
    assert (config.optim.lr_init, config.optim.warmup_steps) == (1e-3, 9)
    assert config.optim.betas == (0.9, 0.99)
    assert config.peft.targets == ("att.key",)


def test_number_without_dot_is_a_number(tmp_path):
    # PyYAML reads 3e-4 as a string.
    assert load_config(recipe(tmp_path), ["optim.lr_init=3e-4"]).optim.lr_init == 3e-4


@pytest.mark.parametrize(
    ("text", "seconds"), [("1:12:00:00", 129600), ("00:11:30:00", 41400), ("90", 90), ("01:30", 90), ("0.5", 0.5)]
)
def test_times_are_not_numbers_of_base_60(tmp_path, text, seconds):
    # YAML 1.1 reads 1:12:00:00 as 259200.
    assert load_config(recipe(tmp_path), [f"trainer.max_time={text}"]).trainer.max_time == seconds
    path = recipe(tmp_path, MINIMAL + f"trainer: {{max_time: {text}}}\n")
    assert load_config(path).trainer.max_time == seconds


def test_all_problems_in_one_go(tmp_path):
    lines = problems(recipe(tmp_path), "peft.rank=0", "data.ctx_len=0", "trainer.max_epochs=two", "optim.lr=1")
    assert len(lines) == 4
    text = "\n".join(lines)
    for needle in ("peft.rank", "data.ctx_len", "trainer.max_epochs", "'two'", "optim.lr_init"):
        assert needle in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("peft.rnak", "peft.rank"),
        ("optim.leanring_rate", "optim.lr_init"),
        ("trainer.seeed", "trainer.seed"),
        ("epoch_count", "trainer.max_epochs"),
        ("checkpoint.keep_lst", "checkpoint.keep_last"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, nearest):
    (line,) = problems(recipe(tmp_path), f"{key}=1")
    assert f"unknown key {key}" in line
    assert nearest in line.split(";")[1]


def test_names_of_other_trainers_point_to_real_keys():
    assert set(KNOWN_ELSEWHERE.values()) <= set(leaf_keys())


def test_round_trip(tmp_path):
    config = load_config(recipe(tmp_path), ["optim.betas=[0.8, 0.95]", "peft.train_parts=[ln, emb]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "needle"),
    [
        (["model.init.n_layer=2", "model.init.n_embd=64"], "exactly one of model.path"),
        (["peft.svd_niter=4"], "peft.svd_niter applies to"),
        (["trainer.global_batch_size=8", "trainer.accumulate_grad_batches=2"], "not both"),
        (["data.prompt_column=q"], "go together"),
        (["samples.temperature=0"], "samples.temperature: must be above 0, got 0; null takes the likeliest"),
        (["optim.schedule=constant", "optim.lr_final=0"], "constant never reaches"),
        (["optim.schedule=exponential", "optim.lr_final=0"], "exponential needs"),
        (["optim.weight_decay_final=0.1"], "exponentially"),
        (["model={init: {n_layer: 1, n_embd: 100}}"], "not a multiple of head_size"),
        (["checkpoint.remote_url=bucket/run"], "write it like s3://bucket/folder"),
        (["checkpoint.remote_options={endpoint_url: x}"], "applies to checkpoint.remote_url"),
        (
            ["checkpoint.remote_url=s3://b/r", "checkpoint.remote_options={client_kwargs: {aws_secret_access_key: x}}"],
            "must not hold aws_secret_access_key",
        ),
        (["out_dir"], "not of the form key.sub=value"),
        (["--lr=1"], "not of the form key.sub=value"),
        (["optim.lr_init=nan"], "optim.lr_init"),
        (["optim.lr_init=1", "optim.lr_init.x=1"], "lr_init is a value, not a section"),
    ],
)
def test_cross_field_rules_say_what_to_do(tmp_path, overrides, needle):
    assert any(needle in line for line in problems(recipe(tmp_path), *overrides))


def test_missing_recipe_names_the_nearest(tmp_path):
    recipe(tmp_path)
    (line,) = problems(tmp_path / "rr.yaml")
    assert "does not exist" in line
    assert "r.yaml" in line


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", ""])
def test_broken_recipe_is_one_line(tmp_path, text):
    assert all("\n" not in line for line in problems(recipe(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (MINIMAL + "trainer: {max_steps: 1}\noptim:\ntrainer:\n  seed: 3\n", "trainer stands there twice.*line 6"),
        (MINIMAL + "optim:\n  lr_init: 1\n  eps: 1\n  lr_init: 2\n", "lr_init stands there twice.*line 7"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, place):
    (line,) = problems(recipe(tmp_path, text))
    assert re.search(place, line)


def test_a_section_without_keys_has_its_defaults(tmp_path):
    config = load_config(recipe(tmp_path, MINIMAL + "trainer:\noptim:\n  lr_scale:\n"))
    assert config == load_config(recipe(tmp_path))
    assert problems(recipe(tmp_path, "out_dir: o\nmodel: {path: a}\ndata:\n")) == [
        "missing key data.path: add it to the recipe or give data.path=..."
    ]


def test_escapes_of_json_are_read_as_json_means_them(tmp_path):
    override = r'samples.prompts=["\ud83d\ude00", "\u00fc"]'
    assert load_config(recipe(tmp_path), [override]).samples.prompts == ("😀", "ü")
    (line,) = problems(recipe(tmp_path), r'samples.prompts=["\ud83d"]')
    assert "half of a surrogate pair stands there alone" in line


def test_paths_know_home_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    given = ["out_dir=~/out", "model.path=$SCRATCH/b.pth", 'data.path=["${SCRATCH}/a.jsonl", b.jsonl]', "eval.path=~/v"]
    config = load_config(recipe(tmp_path), given)
    assert (config.out_dir, config.model.path) == ("/home/me/out", "/fast/b.pth")
    assert (config.data.path, config.eval.path) == (("/fast/a.jsonl", "b.jsonl"), "/home/me/v")
    assert problems(recipe(tmp_path), "data.path=$NO_SUCH_NAME/a.jsonl", "out_dir=''") == [
        "out_dir: the path is empty; write one, . for the current folder",
        "data.path: the environment has no variable NO_SUCH_NAME; set it, or write the path out",
    ]


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("peft.targets=att.key", "peft.targets: write a list, such as [a, b], got 'att.key'"),
        ("trainer=3", "trainer: write the keys of this section below it, got 3"),
        ("data.path=[3]", "data.path.0: input should be a valid string, got 3"),
        ("data.path=[a", "override 'data.path=[a' is not valid YAML (expected ',' or ']', but got '<stream end>'); "
         "quote what is a text"),
    ],
)  # fmt: skip
def test_wrong_types_are_told_in_the_words_of_yaml(tmp_path, override, want):
    assert want in problems(recipe(tmp_path), override)


def test_what_is_no_recipe_is_told_apart(tmp_path):
    assert problems(tmp_path) == [f"recipe {tmp_path} is a folder; give the YAML file in it"]
    assert "is empty" in problems(recipe(tmp_path, "# nothing\n"))[0]
    assert problems(tmp_path / "optim.lr_init=1") == [
        f"recipe {tmp_path / 'optim.lr_init=1'} does not exist; the recipe comes first, then key.sub=value"
    ]


def test_micro_batches(tmp_path):
    trainer = load_config(recipe(tmp_path), ["trainer.global_batch_size=12", "trainer.micro_batch_size=2"]).trainer
    assert [trainer.micro_batches(w) for w in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(UserError, match="8 or 16"):
        trainer.micro_batches(4)


@pytest.mark.parametrize("path", sorted(Path("launch/recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_loads(path):
    load_config(path)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "data.streaming knows no epochs: set trainer.max_steps, or data.max_documents"),
        (["trainer.max_steps=9", "trainer.max_epochs=2"], "leave trainer.max_epochs at 1"),
        (
            ["trainer.max_steps=9", "eval.split_fraction=0.1"],
            "no whole to take eval.split_fraction from",
        ),
        (["trainer.max_steps=9", "eval.path=v.jsonl"], "data.streaming knows no epochs: set eval.every_n_steps"),
        (
            ["trainer.max_steps=9", "eval.path=v.jsonl", "eval.every_n_steps=0.5"],
            "set eval.every_n_steps to a number of updates",
        ),
        (["trainer.max_steps=9", "trainer.max_tokens=5"], "set trainer.max_steps in place of trainer.max_tokens"),
        (["trainer.max_steps=9", "trainer.limit_train_batches=5"], "in place of trainer.limit_train_batches"),
        (["trainer.max_steps=9", "trainer.overfit_batches=0.5"], "in place of trainer.overfit_batches"),
    ],
)
def test_a_stream_has_no_epochs(overrides, problem):
    base = ["out_dir=x", "model.path=m.pth", "data.path=d.jsonl", "data.streaming=true"]
    with pytest.raises(UserError) as caught:
        load_config(None, [*base, *overrides])
    assert problem in str(caught.value)
    assert load_config(None, [*base, "data.max_documents=9", *overrides[1:]]).data.streaming
    assert load_config(None, [*base, "trainer.max_steps=9", "eval.path=v.jsonl", "eval.every_n_steps=5"])


def test_overrides_may_follow_options(capsys):
    from rwkv_accel.train import main

    assert main(["launch/recipes/demo.yaml", "--print-config", "trainer.max_epochs=3"]) == 0
    assert "max_epochs: 3" in capsys.readouterr().out
