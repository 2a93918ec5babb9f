"""Per-token losses against the float64 formulas, and which documents are scored."""

import json

import pytest
import torch
import yaml

from rwkv_accel.errors import UserError
from rwkv_accel.report import tokens
from rwkv_accel.report.__main__ import main
from rwkv_accel.report.reading import read_run
from rwkv_accel.report.tokens import write_token_losses
from tests.helpers import tiny_checkpoint
from tests.plain_rwkv7 import logits

TEXTS = ["the river", "quiet farms, ä", "old mills", "nobody counts", "the hours", "past"]


@pytest.fixture
def run(tmp_path):
    """A finished full run over TEXTS."""

    def make(**eval_section):
        folder = tmp_path / "run"
        save = folder / "adapter" / "step-00000009"
        save.mkdir(parents=True, exist_ok=True)
        tiny_checkpoint(save / "model.pth", n_embd=32, head_size=16)
        (folder / "adapter" / "LATEST").write_text("step-00000009\n")
        (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        (tmp_path / "valid.jsonl").write_text(json.dumps({"text": "where"}) + "\n")
        recipe = {
            "out_dir": str(folder),
            "model": {"path": "gone.pth"},
            "peft": {"method": "full"},
            "data": {"path": str(tmp_path / "train.jsonl"), "tokenizer": "byte", "cache_dir": None},
            "eval": eval_section,
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
        return folder

    return make


def scored(folder):
    return json.loads((folder / "token_losses.json").read_text())


def text_of(document):
    return "".join(token["text"] for token in document["tokens"])


def test_losses_and_expectations_equal_the_formulas(run):
    folder = run()
    write_token_losses(folder, 1)
    (document,) = scored(folder)["documents"]
    weights = {name: t.double() for name, t in torch.load(folder / "adapter/step-00000009/model.pth").items()}
    ids = [byte + 1 for byte in TEXTS[0].encode()] + [0]
    log_p_TV = torch.log_softmax(logits(weights, ids[:-1]), -1)
    assert text_of(document) == TEXTS[0] + "<end of text>"
    assert document["tokens"][0] == {"text": "t", "target": False, "loss": None}
    for position, token in enumerate(document["tokens"][1:]):
        assert token["loss"] == pytest.approx(-log_p_TV[position, ids[position + 1]].item(), abs=1e-4)
        top = log_p_TV[position].topk(3)
        assert [share for _, share in token["expected"]] == pytest.approx(top.values.exp().tolist(), abs=1e-4)
        first = int(top.indices[0])
        shown = bytes([first - 1]).decode(errors="backslashreplace") if first else "<end of text>"
        assert token["expected"][0][0] == shown
    mean = -sum(log_p_TV[t, ids[t + 1]].item() for t in range(len(ids) - 1)) / (len(ids) - 1)
    assert document["loss"] == pytest.approx(mean, abs=1e-4)
    assert document["num_targets"] == len(ids) - 1


def test_documents_are_the_validation_ones(run, tmp_path):
    folder = run()
    write_token_losses(folder, 2)
    assert [text_of(d) for d in scored(folder)["documents"]] == [
        "the river<end of text>",
        "quiet farms, \\xc3\\xa4<end of text>",
    ]
    assert scored(folder)["weights"] == "weights step-00000009, training data"
    write_token_losses(run(path=str(tmp_path / "valid.jsonl")), 5)
    assert [text_of(d) for d in scored(folder)["documents"]] == ["where<end of text>"]
    assert scored(folder)["weights"] == "weights step-00000009, validation data"


def test_held_out_documents_are_those_that_the_run_never_trained_on(run):
    from rwkv_accel.config.schema import RunConfig
    from rwkv_accel.data.loader import build_train_loader
    from rwkv_accel.data.packing import Subset

    folder = run(split_fraction=0.34)
    write_token_losses(folder, 9)
    held_out = {text_of(d).removesuffix("<end of text>") for d in scored(folder)["documents"]}
    config = RunConfig.model_validate(yaml.safe_load((folder / "run.yaml").read_text()))
    loader = build_train_loader(
        config.data, config.trainer, rank=0, world_size=1, device=torch.device("cpu"), vocab_size=257,
        subset=Subset(0.34, config.trainer.seed, held_out=False),
    )  # fmt: skip
    trained = bytes(
        token - 1 for window in loader.windows(0, 0) for batch in window.batches
        for token in batch.ids_BT.flatten().tolist() if token
    )  # fmt: skip
    assert len(held_out) == 2
    for text in TEXTS:
        assert (text.encode() in trained) == (text.replace("ä", "\\xc3\\xa4") not in held_out)


def test_long_documents_are_cut_and_said(run, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", 4)
    folder = run()
    write_token_losses(folder, 1)
    (document,) = scored(folder)["documents"]
    assert len(document["tokens"]) == 4
    assert document["num_left_out"] == len(TEXTS[0]) + 1 - 4


def test_the_report_shows_them_and_keeps_them(run, capsys):
    folder = run()
    assert main([str(folder), "--tokens", "1"]) == 0
    assert "the river" not in capsys.readouterr().out
    assert len(read_run(folder, "run")["token_losses"]["documents"]) == 1
    assert main([str(folder)]) == 0
    assert '"documents":[{"place"' in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_without_weights_is_one_line(run, capsys):
    folder = run()
    (folder / "adapter" / "LATEST").unlink()
    assert main([str(folder), "--tokens", "1"]) == 2
    assert "holds no saved weights" in capsys.readouterr().err
    (folder / "run.yaml").unlink()
    with pytest.raises(UserError, match="leave --tokens out"):
        write_token_losses(folder, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "0"], "--tokens 0 shows nothing; give 1 or more"),
        (["--points", "5"], "--points 5 is too few for a curve; give 100 or more"),
        (["--serve", "70000"], "--serve 70000 is no port; give 0 to 65535"),
        (["--serve", "0", "--output", "x"], "--serve writes no file; leave --output out"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, options, said):
    assert main([str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err
