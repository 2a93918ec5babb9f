"""Exact match: what is taken from a reply, what does not count, and whole runs over a file."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from rwkv_accel.config.schema import EvalConfig
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.interrupt import Stopped
from rwkv_accel.tasks import answers
from rwkv_accel.tasks.answers import answer_all, extract, normalize
from rwkv_accel.tasks.examples import AnswerExample, TaskSet
from tests.unit.generation.conftest import build_model


@pytest.mark.parametrize(
    ("text", "regex", "want"),
    [
        ("the whole", None, "the whole"),
        ("a #### 4, no: #### 42", r"#### (\d+)", "42"),
        ("x = 7; x = 8", r"\d", "8"),
        ("nothing here", r"#### (\d+)", None),
    ],
)
def test_the_last_match_is_the_answer(text, regex, want):
    assert extract(text, regex) == want


@pytest.mark.parametrize(
    ("text", "steps", "want"),
    [
        ("  Two\n words ", (), "Two words"),
        ("PARIS", ("case",), "paris"),
        ("The cat, an owl!", ("articles", "punctuation"), "cat owl"),
        ("Mr. O'Neil", ("punctuation",), "Mr ONeil"),
        ("$1,234.50.", ("numbers",), "1234.5"),
        ("042", ("numbers",), "42"),
        ("-3.0", ("numbers",), "-3"),
        ("1,2", ("numbers",), "1,2"),
        ("is -3.0, ok.", ("numbers", "punctuation"), "is -3 ok"),
        ("50%", ("numbers",), "50"),
        ("...", ("numbers",), "..."),
    ],
)
def test_what_does_not_count(text, steps, want):
    assert normalize(text, steps) == want


@pytest.fixture(scope="module")
def generator():
    return TextGenerator(build_model(257), build_tokenizer("byte"))


def ranks(index=0, world=1):
    return SimpleNamespace(num_processes=world, process_index=index, device=torch.device("cpu"))


def config(**eval_keys):
    return EvalConfig(answers_path="x", answers_max_new_tokens=9, **eval_keys)


def task(generator, prompts):
    """Every second answer is what the model says, the others are not."""
    replies = generator.generate(prompts, max_new_tokens=9, temperature=None)
    texts = [reply.text + "?" * (index % 2) for index, reply in enumerate(replies)]
    examples = [AnswerExample(f"f:{i}", prompt, ("no", text)) for i, (prompt, text) in enumerate(zip(prompts, texts))]
    return TaskSet("f", tuple(examples))


PROMPTS = [f"Question {'very ' * i}?" for i in range(7)]


@pytest.mark.parametrize("batch_size", [64, 2])
def test_share_of_right_replies(generator, batch_size):
    result = answer_all(ranks(), generator, task(generator, PROMPTS), config(answers_batch_size=batch_size))
    assert result.values()["exact_match"] == 4 / 7
    assert [record.is_right for record in result.records] == [True, False] * 3 + [True]
    assert result.describe().startswith("f exact match 57.14% over 7 questions")


def test_punctuation_may_not_count_and_a_missing_match_is_wrong(generator):
    questions = task(generator, PROMPTS)
    assert answer_all(ranks(), generator, questions, config(answers_normalize=["punctuation"])).values()[
        "exact_match"
    ] == pytest.approx(1.0)
    values = answer_all(ranks(), generator, questions, config(answers_regex="#### (.*)")).values()
    assert (values["exact_match"], values["no_answer_share"]) == (0.0, 1.0)


def test_stop_texts_and_length_reach_the_generator(generator):
    prompts = PROMPTS[:1]
    reply = generator.generate(prompts, max_new_tokens=9, temperature=None)[0].text
    (record,) = answer_all(ranks(), generator, task(generator, prompts), config(answers_stop=[reply[3]])).records
    assert record.reply == reply[: reply.index(reply[3])]
    assert record.stopped
    assert not answer_all(ranks(), generator, task(generator, prompts), config()).records[0].stopped


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_records(generator, monkeypatch, world):
    questions, settings = task(generator, PROMPTS), config(answers_batch_size=2)
    want = answer_all(ranks(), generator, questions, settings)
    shares = []
    monkeypatch.setattr(answers, "all_ranks", lambda accelerator, mine: (shares.append(mine[0]), [mine])[1])
    for rank in range(world):
        answer_all(ranks(rank, world), generator, questions, settings)
    assert all(shares)
    found = sorted(chain.from_iterable(shares), key=lambda item: item[0])
    assert tuple(record for _, record in found) == want.records


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stop_is_noticed_before_each_batch_and_after_the_last(generator, number):
    questions, asked = task(generator, PROMPTS[:4]), []
    stop = SimpleNamespace(agreed=lambda: asked.append(1) or len(asked) == number)
    with pytest.raises(Stopped):
        answer_all(ranks(), generator, questions, config(answers_batch_size=2), stop)
    never = SimpleNamespace(agreed=lambda: False)
    assert len(answer_all(ranks(), generator, questions, config(answers_batch_size=2), never).records) == 4


def test_a_generator_that_is_interrupted_answers_every_prompt_with_what_it_has():
    generator = TextGenerator(build_model(257), build_tokenizer("byte"), should_stop=lambda: True)
    assert [reply.stop_reason for reply in generator.generate(PROMPTS, max_new_tokens=3)] == ["interrupted"] * 7


def test_a_mistake_on_one_rank_is_raised_on_all(generator, monkeypatch):
    error = UserError("too long")
    monkeypatch.setattr(answers, "all_ranks", lambda accelerator, mine: [mine, ([], error)])
    with pytest.raises(UserError, match="too long"):
        answer_all(ranks(0, 2), generator, task(generator, PROMPTS), config())
