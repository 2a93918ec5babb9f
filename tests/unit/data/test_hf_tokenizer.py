"""A Hugging Face tokenizer as the run's tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as hf_decoders

from rwkv_accel.data.template import Span, encode_spans, render
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError

from .conftest import make_loader

MESSAGES = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "wörld 你"}]


@pytest.fixture
def folder(tmp_path):
    """A small byte-level BPE with <eos> as token 0, saved the way transformers does."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = hf_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator(["hello world, hello again", "User: Assistant:"] * 20, trainer)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return tmp_path


def test_ids_are_those_of_the_library(folder):
    tokenizer = build_tokenizer(str(folder))
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hello 你") == fast.encode("hello 你").ids
    assert tokenizer.decode(tokenizer.encode("hello 你")) == "hello 你"
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (1, fast.get_vocab_size())
    assert tokenizer.decode([tokenizer.eot_id, 10**6]) == ""


def test_masks_and_end_of_text(folder):
    tokenizer = build_tokenizer(str(folder / "tokenizer.json"))
    ids, mask = encode_spans(tokenizer, render(MESSAGES))
    assert ids[-1] == 1
    assert tokenizer.decode(i for i, m in zip(ids, mask) if m) == " wörld 你"
    ids, mask = encode_spans(tokenizer, render(MESSAGES, target_roles=("user",)))
    assert tokenizer.decode(i for i, m in zip(ids, mask) if m) == " héllo\n\n"


def test_end_of_text_that_a_template_wrote_is_not_doubled(folder):
    tokenizer = build_tokenizer(str(folder))
    ids, mask = encode_spans(tokenizer, [Span("a", False), Span("b<eos>", True, True)])
    assert (ids.count(1), ids[-1], mask[-1]) == (1, 1, True)


def test_trains_through_the_loader(folder, write_jsonl):
    loader = make_loader(write_jsonl([{"messages": MESSAGES}]), tokenizer=str(folder), ctx_len=64, vocab_size=400)
    (batch,) = next(loader.windows(0, 0)).batches
    assert batch.labels_BT[0, -1] == 1


@pytest.mark.parametrize(
    ("config", "problem"),
    [(None, "names no end of text"), ({}, "eos_token None is no token"), ({"eos_token": "<x>"}, "'<x>' is no token")],
)
def test_no_end_of_text(folder, config, problem):
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=problem):
        build_tokenizer(str(folder))


def test_damaged_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        build_tokenizer(str(tmp_path))
