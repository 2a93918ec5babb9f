"""World and byte tokenizers against published values and against the pip package `rwkv`."""

from pathlib import Path

import pytest
import rwkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from rwkv_accel.data.tokenizer import build_tokenizer, read_world_vocabulary
from rwkv_accel.errors import UserError

REFERENCE_VOCABULARY = Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt")
WORLD = build_tokenizer("world")
BYTE = build_tokenizer("byte")

# Seen in both packages, pyrwkv-tokenizer 0.9.1 and rwkv 0.8.32.
PUBLISHED = {
    "Hello world!": [33155, 40213, 34],
    "\n": [11],
    "\n\n": [261],
    "\n\n\n": [3328],
    " ": [33],
    "User:": [24281, 59],
    "Assistant:": [5585, 41693, 59],
    "\n\nUser:": [261, 24281, 59],
    "System:": [40812, 59],
    "<think>": [61, 35762, 63],
    " <think": [295, 35762],
    "</think>": [754, 35762, 63],
    "Assistant: <think>\n</think>": [5585, 41693, 59, 295, 35762, 63, 11, 754, 35762, 63],
    "你好": [10464, 11685],
    "😀": [3319, 153, 129],
    "1234567": [632, 654, 676, 56],
    "\x17": [24],
    "\x00": [1],
    "hi。\n\n": [1922, 28329, 11],
    " \n\n": [3336],
    "": [],
}


REFERENCE = TRIE_TOKENIZER(str(REFERENCE_VOCABULARY))


@pytest.mark.parametrize("text", PUBLISHED)
def test_world_gives_the_published_ids(text):
    assert WORLD.encode(text) == PUBLISHED[text]
    assert WORLD.decode(PUBLISHED[text]) == text


def test_every_world_token_has_the_reference_bytes():
    table = read_world_vocabulary()
    assert len(table) == 65530
    assert {index: token for index, token in enumerate(table) if index} == dict(REFERENCE.idx2token)


def test_vocabulary_of_the_reference_package_reads_the_same():
    assert read_world_vocabulary(REFERENCE_VOCABULARY) == read_world_vocabulary()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_world_encodes_like_the_reference_package(text):
    assert WORLD.encode(text) == REFERENCE.encode(text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_survive(data):
    for tokenizer in (WORLD, BYTE):
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.binary(min_size=1, max_size=8))
def test_invalid_utf8_is_encoded_greedily_too(text, tail):
    data = text.encode() + tail
    assert WORLD.encode(data) == REFERENCE.encodeBytes(data)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 70000), max_size=20))
def test_decode_takes_any_ids(ids):
    known = [i for i in ids if 1 <= i <= 65529]
    assert WORLD.decode(ids) == WORLD.decode_bytes(known).decode("utf-8", errors="replace")
    assert BYTE.decode_bytes(ids) == bytes(i - 1 for i in ids if 1 <= i <= 256)


def test_half_a_character_decodes_to_a_replacement():
    assert WORLD.decode([3319]) == "\ufffd"
    assert WORLD.decode([0, 65530, -1, 33155]) == "Hello"


def test_sizes_and_end_of_text():
    assert (WORLD.vocab_size, WORLD.eot_id) == (65536, 0)
    assert (BYTE.vocab_size, BYTE.eot_id) == (257, 0)


def test_byte_ids_are_worlds_ids_of_single_bytes():
    table = read_world_vocabulary()
    assert [table[i] for i in range(1, 257)] == [bytes([b]) for b in range(256)]
    assert BYTE.encode("Aé") == [66, 196, 170]


def test_lone_surrogate_is_a_clear_error():
    for tokenizer in (WORLD, BYTE):
        with pytest.raises(UserError, match=r"surrogate pair \(U\+D83D at character 2\)"):
            tokenizer.encode("ab\ud83d")


def test_damaged_vocabulary_is_refused(tmp_path):
    lines = REFERENCE_VOCABULARY.read_text(encoding="utf-8").splitlines()
    (tmp_path / "short.txt").write_text("\n".join(lines[:-2]), encoding="utf-8")
    with pytest.raises(UserError, match="lacks 2 of 65529 tokens"):
        read_world_vocabulary(tmp_path / "short.txt")
    (tmp_path / "wrong.txt").write_text("\n".join([*lines, "9 'ab' 3"]), encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        read_world_vocabulary(tmp_path / "wrong.txt")


def test_unknown_tokenizer_says_what_is_known():
    with pytest.raises(UserError, match="'gpt2' is neither world nor byte nor a file"):
        build_tokenizer("gpt2")


def test_mask_of_a_token_that_straddles_the_border_is_off():
    # "。\n" is one World token: half target is no target.
    assert WORLD.encode_spans([("hi。", True), ("\n\n", False)]) == ([1922, 28329, 11], [True, False, False])
    assert WORLD.encode_spans([("hi", False), ("", True), ("。", False)])[1] == [False, False]
