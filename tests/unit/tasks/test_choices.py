"""Multiple choice: scores against whole forwards by hand, shared prompts, the same bits on any number of processes."""

import json
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.interrupt import Stopped
from rwkv_accel.tasks import choices
from rwkv_accel.tasks.choices import ChoiceRecord, ChoiceResult, plan_calls, score_choices
from rwkv_accel.tasks.examples import read_choices
from tests.unit.generation.conftest import build_model

ROWS = [
    {"question": "What does a cow say?", "choices": ["moo", "woof, I think", "meow"], "answer": 0},
    {"prompt": "A", "choices": [" b", "cc"], "answer": 1},
    {"prompt": "B", "choices": ["d", "e"], "answer": "B"},
    {"prompt": "Two plus two is, as far as anybody here can say:", "choices": [" 4", " five", " 22"], "answer": 0},
    {"prompt": "A", "choices": ["x", "yy"], "answer": 0},
]


@pytest.fixture(scope="module")
def model():
    return build_model(257).eval()


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_choices("f", str(path), DataConfig(path="-", template="raw"), build_tokenizer("byte"), None)


def alone(index=0, world=1):
    return SimpleNamespace(num_processes=world, process_index=index, device=torch.device("cpu"))


def by_hand(model, task):
    scores = []
    for example in task.examples:
        sums = []
        for choice in example.choices:
            ids = torch.tensor([[*choice.prefix, *choice.ids]])
            with torch.no_grad():
                log_probs = model(ids)[0].log_softmax(-1)
            first = len(choice.prefix)
            sums.append(sum(log_probs[first + i - 1, token].item() for i, token in enumerate(choice.ids)))
        scores.append(sums)
    return scores


@pytest.mark.parametrize(("pass_tokens", "logit_tokens"), [(2048, 256), (7, 3), (1, 1), (60, 9)])
def test_scores_are_those_of_whole_forwards(model, task, monkeypatch, pass_tokens, logit_tokens):
    monkeypatch.setattr(choices, "PASS_TOKENS", pass_tokens)
    monkeypatch.setattr(choices, "LOGIT_TOKENS", logit_tokens)
    result = score_choices(alone(), model, task)
    assert [record.place for record in result.records] == [example.place for example in task.examples]
    for record, want in zip(result.records, by_hand(model, task)):
        assert record.log_likelihoods == pytest.approx(want, abs=1e-9)
    assert [record.num_tokens for record in result.records][:2] == [(3, 13, 4), (2, 2)]


class Counting:
    """The model, and what it was asked."""

    def __init__(self, model):
        self.model, self.calls, self.tokens, self.training = model, 0, 0, True

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def __call__(self, ids, *args, **kwargs):
        assert not self.training
        self.calls += 1
        self.tokens += ids.numel()
        return self.model(ids, *args, **kwargs)


def test_a_prompt_is_read_once_for_all_its_choices(model, task):
    counting = Counting(model)
    score_choices(alone(), counting, task)
    prompts = sum(len(row.get("prompt") or row["question"]) - 1 for row in ROWS)
    replies = sum(len(text) for row in ROWS for text in row["choices"])
    assert counting.tokens == prompts + replies
    assert counting.training


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_bits_and_calls(model, task, monkeypatch, world):
    monkeypatch.setattr(choices, "PASS_TOKENS", 20)
    want = score_choices(alone(), model, task)
    shares, calls = [], []
    monkeypatch.setattr(choices, "all_ranks", lambda accelerator, mine: (shares.append(mine), [mine])[1])
    for rank in range(world):
        counting = Counting(model)
        score_choices(alone(rank, world), counting, task)
        calls.append(counting.calls)
    assert len(set(calls)) == 1
    found = sorted(chain.from_iterable(shares), key=lambda item: item[0])
    assert tuple(record for _, record in found) == want.records


class StopAt:
    """Wants to stop when asked for the n-th time."""

    def __init__(self, number):
        self.left = number

    def agreed(self):
        self.left -= 1
        return self.left == 0


def test_a_stop_is_noticed_between_passes(model, task, monkeypatch):
    monkeypatch.setattr(choices, "PASS_TOKENS", 20)
    counting = Counting(model)
    with pytest.raises(Stopped):
        score_choices(alone(), counting, task, StopAt(2))
    assert 0 < counting.calls <= 3


def test_three_accuracies_from_the_same_scores():
    # The right one is the shortest, the one with most bytes per token, and the longest.
    record = ChoiceRecord("x:1", 0, (-4.0, -6.0, -7.0), (1, 3, 2), (2, 4, 14))
    assert (record.chosen, record.chosen_per_token, record.chosen_per_byte) == (0, 1, 2)
    result = ChoiceResult("x", (record, ChoiceRecord("x:2", 1, (-4.0, -6.0), (1, 3), (2, 2))))
    assert result.values() == {"accuracy": 0.5, "accuracy_per_token": 0.5, "accuracy_per_byte": 0.0, "examples": 2}
    assert result.describe() == "x accuracy 50.00%, 50.00% per token, 0.00% per byte over 2 questions"


def test_calls_are_whole_ordered_and_bounded():
    lengths = [5, 1, 12, 3]
    calls = plan_calls(lengths, 4)
    assert all(sum(stop - start for _, start, stop in call) <= 4 for call in calls)
    assert all(len({start for _, start, _ in call}) == 1 for call in calls)
    for sequence, length in enumerate(lengths):
        pieces = [(start, stop) for call in calls for s, start, stop in call if s == sequence]
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == length
