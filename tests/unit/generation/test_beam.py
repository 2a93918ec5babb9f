"""Beam search against greedy decoding and against trying every possible reply."""

import itertools

import pytest
import torch

from rwkv_accel.errors import UserError
from rwkv_accel.generation.beam import BeamParams, beam_search
from rwkv_accel.generation.engine import TextGenerator

LETTERS = "\0abcd"


class LetterTokenizer:
    """id = position in LETTERS; a sixth row of the model stands for nothing."""

    vocab_size = 6

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode_bytes(self, ids):
        return "".join(LETTERS[i] for i in ids if 1 <= i < len(LETTERS)).encode()


@pytest.fixture(scope="module", params=[0, 1])
def letters(request, make_model):
    return TextGenerator(make_model(6, seed=request.param), LetterTokenizer())


@pytest.fixture(scope="module")
def every_reply(letters):
    return all_replies(letters, "ab", 4)


@torch.no_grad()
def all_replies(generator, prompt, max_new_tokens, stop=()):
    """(log-probability, length, ids with the stop token) of every possible reply, by full forwards."""
    start = generator.tokenizer.encode(prompt)
    replies = []
    for ids in itertools.product(range(5), repeat=max_new_tokens):
        cut = next((n for n in range(1, max_new_tokens + 1) if ends(generator, ids[:n], stop)), max_new_tokens)
        if any(ids[cut:]):
            continue  # the same reply as with zeros behind its end
        ids = ids[:cut]
        logits = generator.model(torch.tensor([start + list(ids)]))[0, len(start) - 1 : -1]
        logits[:, 5] = -torch.inf
        log_prob = float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())
        replies.append((log_prob, len(ids), ids))
    return replies


def ends(generator, ids, stop):
    text = generator.tokenizer.decode_bytes(ids).decode()
    return ids[-1] == 0 or any(text.endswith(s) for s in stop)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("early_stop", [True, False])
def test_wide_beams_find_the_best_of_all_replies(letters, every_reply, length_penalty, early_stop):
    replies = every_reply
    assert len(replies) == 1 + 4 + 16 + 64 + 256
    params = BeamParams(
        num_beams=400, num_best=3, max_new_tokens=4, length_penalty=length_penalty, early_stop=early_stop
    )
    found = beam_search(letters, "ab", params)
    best = sorted(replies, key=lambda reply: -reply[0] / reply[1] ** length_penalty)[:3]
    for hypothesis, (log_prob, length, ids) in zip(found, best, strict=True):
        assert hypothesis.log_prob == pytest.approx(log_prob, abs=1e-9)
        assert hypothesis.score == pytest.approx(log_prob / length**length_penalty, abs=1e-9)
        assert hypothesis.ids == tuple(i for i in ids if i)
        assert hypothesis.stop_reason == ("eot" if ids[-1] == 0 else "length")


def test_stop_strings_end_replies(letters):
    stop = ("ba", "cc")
    replies = all_replies(letters, "a", 4, stop)
    found = beam_search(letters, "a", BeamParams(num_beams=400, num_best=5, max_new_tokens=4, stop=stop))
    best = sorted(replies, key=lambda reply: -reply[0] / reply[1])[:5]
    assert [h.log_prob for h in found] == pytest.approx([reply[0] for reply in best], abs=1e-9)
    for hypothesis in found:
        assert not any(s in hypothesis.text for s in stop)
    assert any(
        h.stop_reason == "stop"
        for h in beam_search(
            letters, "a", BeamParams(num_beams=400, num_best=300, max_new_tokens=4, stop=stop, early_stop=False)
        )
    )


@pytest.mark.parametrize("prompt", ["a", "abcd", "ddcab"])
def test_one_beam_is_greedy(letters, prompt):
    greedy = letters.generate([prompt], max_new_tokens=12, temperature=None)[0]
    found = beam_search(letters, prompt, BeamParams(num_beams=1, max_new_tokens=12))
    assert [(h.ids, h.text, h.stop_reason) for h in found] == [(greedy.ids, greedy.text, greedy.stop_reason)]


def test_one_beam_is_greedy_in_bytes(generator):
    for prompt in ("Once", "The"):
        greedy = generator.generate([prompt], max_new_tokens=30, temperature=None)[0]
        assert beam_search(generator, prompt, BeamParams(num_beams=1, max_new_tokens=30))[0].ids == greedy.ids


def test_more_beams_are_no_worse_here(letters):
    scores = [
        beam_search(letters, "abc", BeamParams(num_beams=k, max_new_tokens=5, early_stop=False))[0].score
        for k in (1, 5, 800)
    ]
    assert scores[1] >= scores[0] - 1e-9
    assert scores[2] >= scores[1] - 1e-9


def test_not_stopping_early_finds_at_least_as_good_replies(letters):
    for k in (1, 2, 3):
        early, late = (
            beam_search(letters, "ab", BeamParams(num_beams=k, max_new_tokens=6, early_stop=early_stop))[0].score
            for early_stop in (True, False)
        )
        assert late >= early - 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0, "num_best": 0}, "num_beams 0 is out of range"),
        ({"num_beams": 2, "num_best": 3}, r"num_best 3 .* between 1 and num_beams \(2\)"),
        ({"length_penalty": float("nan")}, "length_penalty nan"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"stop": ("",)}, "stop "),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        BeamParams(**settings)


def test_empty_prompt(generator):
    with pytest.raises(UserError, match="prompt is empty"):
        beam_search(generator, "", BeamParams())
