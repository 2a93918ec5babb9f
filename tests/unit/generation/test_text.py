"""Streaming text: never half a character, never a piece of a stop string, and nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.params import STOP_SETS, SamplingParams, default_stop, stop_texts
from rwkv_accel.generation.text import TextStream

BYTES = build_tokenizer("byte")


def pushed(text: bytes, stop=()) -> tuple[list[str], TextStream]:
    """Pieces for one byte (token) at a time, as a consumer sees them."""
    stream, pieces = TextStream(BYTES, stop), []
    for token in BYTES.encode(text):
        pieces.append(stream.push([token]))
        if stream.stopped_at is not None:
            break
    pieces.append(stream.finish())
    return pieces, stream


def test_characters_appear_whole():
    pieces, _ = pushed("aé😀b".encode())
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_a_character_cut_off_at_the_end_is_marked():
    pieces, _ = pushed("ab😀".encode()[:-1])
    assert "".join(pieces) == "ab\ufffd"


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_the_same_text_as_decoding_them_at_once(data):
    pieces, _ = pushed(data)
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@given(
    st.text(alphabet="ab\nUé", max_size=40),
    st.lists(st.text(alphabet="ab\nUé", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_text_ends_at_the_first_stop_and_nothing_shown_is_taken_back(text, stops):
    pieces, stream = pushed(text.encode(), stops)
    # The first stop that is complete wins; of several complete at one character, that which begins first.
    complete = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    expected = text[: min(complete)[1]] if complete else text
    assert "".join(pieces) == expected
    assert (stream.stopped_at is not None) == bool(complete)
    whole = TextStream(BYTES, stops)
    first = whole.push(BYTES.encode(text))
    assert first + whole.finish() == expected


def test_stop_inside_one_token_and_across_tokens():
    world = build_tokenizer("world")
    for reply in ("hi。\n\nUser: x", "hi。\n\nUser:", "hi。\n\nUser:\n"):
        stream = TextStream(world, ["\n\nUser:"])
        shown = ""
        for token in world.encode(reply):
            shown += stream.push([token])
            if stream.stopped_at:
                break
        assert stream.stopped_at == "\n\nUser:"
        assert shown == "hi。"


def test_what_might_be_a_stop_is_held_back_until_it_is_none():
    stream = TextStream(BYTES, ["\n\nUser:"])
    assert stream.push(BYTES.encode("a\n\nUs")) == "a"
    assert not stream.is_clean
    assert stream.push(BYTES.encode("e")) == ""
    assert stream.push(BYTES.encode("\n")) == "\n\nUse"
    assert stream.finish() == "\n"
    half = TextStream(BYTES, [])
    half.push(BYTES.encode("é")[:1])
    assert not half.is_clean


def test_stop_sets_by_name():
    assert stop_texts(("chat",)) == STOP_SETS["chat"]
    assert stop_texts(("line", "paragraph", "line")) == ("\n", "\n\n")
    assert stop_texts(("none",)) == ()
    with pytest.raises(UserError, match="unknown stop 'chatt'; use one of none, chat, paragraph, line"):
        stop_texts(("chatt",))
    assert default_stop("User: a\n\nAssistant:") == STOP_SETS["chat"]
    assert default_stop("Assistant: <think") == STOP_SETS["chat"]
    assert default_stop("the Assistant: said") == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("penalty_decay", 0.0),
        ("presence_penalty", float("nan")),
        ("max_new_tokens", 0),
        ("order", "top"),
        ("seed", -1),
        ("stop", ("a", "")),
    ],
)
def test_values_out_of_bounds_are_named(field, value):
    with pytest.raises(UserError, match=rf"^{field} .* is out of range; it must be"):
        SamplingParams(**{field: value})
