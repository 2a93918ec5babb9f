"""python -m rwkv_accel.evaluate: what is measured follows from the run and the options; mistakes are one line."""

import json
import subprocess
import sys

import pytest
import torch

from rwkv_accel.config.load import dump_config
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.evaluate.__main__ import build_parser, main
from rwkv_accel.evaluate.run import recipe_for
from rwkv_accel.generation.loading import Source, load_generator_model
from rwkv_accel.model.io import load_model
from rwkv_accel.model.precision import Precision
from rwkv_accel.peft.quant import Quant, pack, unpack
from tests.helpers import ROOT, environment, tiny_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base.pth, a run with an eval section, and one file of each kind."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_checkpoint(root / "base.pth")
    config = RunConfig(
        out_dir=str(root / "run"),
        model={"path": str(root / "base.pth")},
        data={"path": "train.jsonl", "tokenizer": "byte", "ctx_len": 77, "template": "raw"},
        trainer={"seed": 5, "global_batch_size": 7},
        eval={"split_fraction": 0.2, "choices_path": "own.jsonl"},
    )
    save = root / "run" / "adapter" / "step-1"
    save.mkdir(parents=True)
    (save / "model.pth").write_bytes((root / "base.pth").read_bytes())
    (save.parent / "LATEST").write_text("step-1\n")
    (root / "run" / "run.yaml").write_text(dump_config(config))
    (root / "text.txt").write_text("Some text.\n\n\nMore of it.\n")
    choices = [{"prompt": "a?", "choices": ["b", "c"], "answer": 0}]
    (root / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return root


def recipe(*argv):
    args = build_parser().parse_intermixed_args([str(a) for a in argv])
    return recipe_for(args, Source(files_base(argv[0])))


def files_base(path):
    return path / "base.pth" if (path / "base.pth").is_file() else path


def test_a_run_is_measured_as_its_recipe_says(files):
    args = build_parser().parse_intermixed_args([str(files / "run")])
    config = recipe_for(args, Source(files / "base.pth", tokenizer="byte"))
    assert (config.eval.split_fraction, config.eval.choices_path) == (0.2, "own.jsonl")
    assert (config.data.path, config.data.ctx_len, config.trainer.seed) == ("train.jsonl", 77, 5)
    assert config.model.path == str(files / "base.pth")
    assert config.trainer.global_batch_size is None


def test_a_checkpoint_with_an_adapter_is_asked_in_the_template_of_the_adapter(files):
    def template(*options):
        args = build_parser().parse_intermixed_args([str(files / "base.pth"), "--data", "x.txt", *options])
        return recipe_for(args, Source(files / "base.pth", tokenizer="byte", template="raw")).data.template

    assert (template(), template("--template", "rwkv")) == ("raw", "rwkv")
    assert recipe(files / "base.pth", "--data", "x.txt").data.template == "rwkv"


def test_options_and_overrides_take_the_place_of_the_recipe(files):
    argv = [
        files / "run" / "adapter" / "step-1", "--data", "x.txt", "--data", "y.jsonl", "--answers", "a.jsonl",
        "--limit", 9, "--ctx-len", 50, "--template", "rwkv", "--regex", "(.)", "--normalize", "case", "--normalize",
        "numbers", "--max-new-tokens", 3, "--stop", "line", "--stop-text", "END", "eval.answers_batch_size=2",
    ]  # fmt: skip
    args = build_parser().parse_intermixed_args([str(a) for a in argv])
    config = recipe_for(args, Source(files / "base.pth", tokenizer="byte"))
    assert config.eval.model_dump(exclude_defaults=True) == {
        "path": ("x.txt", "y.jsonl"), "answers_path": ("a.jsonl",), "limit_examples": 9, "answers_regex": "(.)",
        "answers_normalize": ("case", "numbers"), "answers_max_new_tokens": 3, "answers_stop": ("\n", "END"),
        "answers_batch_size": 2,
    }  # fmt: skip
    assert (config.data.ctx_len, config.data.template) == (50, "rwkv")


def test_a_checkpoint_gets_defaults_and_the_tokenizer_of_its_size(files):
    config = recipe(files / "base.pth", "--choices", files / "choices.jsonl")
    assert (config.data.tokenizer, config.data.template, config.data.ctx_len) == ("byte", "rwkv", 1024)
    assert not config.eval.has_loss


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base.pth"], "there is nothing to measure (a checkpoint has no recipe); give --data, --choices or --answers"),
        (["nothing.pth", "--data", "text.txt"], "nothing.pth does not exist"),
        (["base.pth", "--data", "text.txt", "--limit", "0"], "eval.limit_examples: input should be greater"),
        (["base.pth", "--answers", "a", "--regex", "("], "'(' is no regular expression"),
        (["base.pth", "--data", "text.txt", "data.ctx_length=4"], "unknown key data.ctx_length; did you mean"),
        (["base.pth", "--data", "text.tx"], "data.path text.tx does not exist; did you mean"),
        (["base.pth", "--choices", "text.txt"], 'text.txt:1: needs a non-empty "prompt"'),
        (["base.pth", "--data", "text.txt", "--tokenizer", "world"], "tokenizer world (65536 ids) gives token"),
        (["base.pth", "--choices", "choices.jsonl", "--tokenizer", "world"], "world has 65536 ids, the model only 257"),
        (["base.pth", "--data", "text.txt", "--json", "no/where.json"], "no/where.json cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(files, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(files)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_result_that_cannot_be_written_is_one_line_and_the_table_is_shown(files, tmp_path, capsys):
    (tmp_path / "o.json.tmp").mkdir()
    argv = [files / "base.pth", "--data", files / "text.txt", "--json", tmp_path / "o.json"]
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert captured.err == f"error: {tmp_path / 'o.json'} cannot be written: Is a directory; choose another file\n"


def test_whole_command_with_quantised_weights_and_details(files, tmp_path):
    argv = [
        sys.executable, "-m", "rwkv_accel.evaluate", files / "base.pth", "--data", files / "text.txt", "--choices",
        files / "choices.jsonl", "--quant", "int8", "--json", tmp_path / "o.json", "--details", tmp_path / "d.jsonl",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "o.json").read_text())
    assert (document["quant"], document["processes"]) == ("int8", 1)
    text, choices = document["results"]
    # Every byte and both ends of text are targets, except the first of each document.
    assert text["target_tokens"] == len("Some text.") + len("More of it.")
    model, _ = load_generator_model(Source(files / "base.pth"), quant="int8")
    ids = torch.tensor([[byte + 1 for byte in b"User: a?\n\nAssistant: b"]])
    log_probs = model(ids).log_softmax(-1)[0]
    (detail,) = map(json.loads, (tmp_path / "d.jsonl").read_text().splitlines())
    want = float(log_probs[-3, ids[0, -2]] + log_probs[-2, ids[0, -1]])
    assert detail["log_likelihoods"][0] == pytest.approx(want, abs=1e-4)
    assert choices["accuracy"] == float(detail["chosen"] == 0)


def test_quantised_weights_are_those_of_training(files):
    plain = load_model(files / "base.pth", Precision.from_name("32-true"))
    model, _ = load_generator_model(Source(files / "base.pth"), quant="nf4")
    weight = plain.blocks[1].ffn.key.weight
    quant = Quant("nf4")
    want = unpack(pack(weight, quant), quant, tuple(weight.shape), torch.float32)
    assert torch.equal(model.blocks[1].ffn.key.base_weight(torch.float32), want)
    assert not torch.equal(want, weight)


def test_help_loads_no_torch():
    code = "import sys, rwkv_accel.evaluate.__main__ as e; e.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
