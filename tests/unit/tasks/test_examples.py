"""Task files: every documented form, the template around the prompt, and mistakes that name the line."""

import json

import pytest

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.tasks.examples import read_answers, read_choices


def read(reader, tmp_path, *rows, limit=None, **data):
    path = tmp_path / "set.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return reader("set", str(path), DataConfig(path="-", **data), build_tokenizer("byte"), limit)


def text(ids):
    return build_tokenizer("byte").decode(ids)


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["a", "b", "c"], 2, 2),
        (["a", "b", "c"], "B", 1),
        (["red", "blue"], "blue", 1),
        ({"text": ["red", "blue"], "label": ["1", "2"]}, "2", 1),
        (["B", "A"], "A", 1),  # the text counts before the letter
    ],
)
def test_every_way_to_name_the_right_choice(tmp_path, choices, answer, right):
    task = read(read_choices, tmp_path, {"question": "q?", "choices": choices, "answer": answer})
    assert (task.name, task.examples[0].answer) == ("set", right)


def test_the_template_is_that_of_training(tmp_path):
    row = {"prompt": "Say\n\nit", "choices": ["yes", "né "], "answer": 0}
    (example,) = read(read_choices, tmp_path, row).examples
    assert {text(choice.prefix) for choice in example.choices} == {"User: Say\nit\n\nAssistant:"}
    assert [text(choice.ids) for choice in example.choices] == [" yes", " né"]
    assert [choice.num_bytes for choice in example.choices] == [3, 4]
    (example,) = read(read_choices, tmp_path, row, template="raw").examples
    assert [(text(c.prefix), text(c.ids)) for c in example.choices] == [("Say\n\nit", "yes"), ("Say\n\nit", "né ")]


def test_answers_and_their_prompts(tmp_path):
    rows = [{"question": "2+2?", "answer": 4}, {"prompt": "Capital?", "answer": ["Rome", "Roma"]}]
    task = read(read_answers, tmp_path, *rows)
    assert [example.answers for example in task.examples] == [("4",), ("Rome", "Roma")]
    assert task.examples[0].prompt == "User: 2+2?\n\nAssistant:"
    assert read(read_answers, tmp_path, *rows, template="raw", limit=1).examples[0].prompt == "2+2?"
    assert len(read(read_answers, tmp_path, *rows, limit=1).examples) == 1


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_choices, "{", "set.jsonl:2: not JSON"),
        (read_choices, {"choices": ["a", "b"], "answer": 0}, 'set.jsonl:2: needs a non-empty "prompt"'),
        (read_choices, {"prompt": " ", "choices": ["a", "b"], "answer": 0}, 'needs a non-empty "prompt"'),
        (read_choices, {"prompt": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        (read_choices, {"prompt": "q", "choices": ["a", ""], "answer": 0}, "at least two texts"),
        (read_choices, {"prompt": "q", "choices": ["a", "b"], "answer": 2}, "a number from 0 to 1"),
        (read_choices, {"prompt": "q", "choices": ["a", "b"], "answer": True}, "a number from 0 to 1"),
        (read_choices, {"prompt": "q", "choices": ["a", "b"]}, "a number from 0 to 1"),
        (read_answers, {"prompt": "q"}, '"answer" must be a text, a number'),
        (read_answers, {"prompt": "q", "answer": []}, '"answer" must be a text, a number'),
        (read_answers, {"prompt": "q", "answer": ["a", None]}, '"answer" must be a text, a number'),
    ],
)
def test_mistakes_name_the_line(tmp_path, reader, row, message):
    good = {"prompt": "q", "choices": ["a", "b"], "answer": "a"}
    with pytest.raises(UserError) as caught:
        read(reader, tmp_path, good, row)
    assert message in str(caught.value)
    assert "set.jsonl:2" in str(caught.value)


def test_a_file_without_examples_says_so(tmp_path):
    with pytest.raises(UserError, match="has no examples"):
        read(read_answers, tmp_path, "")
