"""Every record shape: what text and which targets it gives."""

import pytest

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.documents import DocumentReader
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError

BYTE = build_tokenizer("byte")


def read(fields, **data):
    """(text, text of the targets with 0 for end of text) of one record."""
    config = DataConfig(path="x.jsonl", tokenizer="byte", **data)
    document = DocumentReader(config, BYTE).document("here", fields)
    targets = [i for i, flag in zip(document.ids, document.is_target) if flag]
    return BYTE.decode(document.ids), BYTE.decode(targets) + "0" * targets.count(0)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = ("User: q\n\nAssistant: a", " a0")


@pytest.mark.parametrize(
    ("fields", "data", "want"),
    [
        ({"text": "abc"}, {}, ("abc", "abc0")),
        ({"body": "abc", "text": "no"}, {"text_column": "body"}, ("abc", "abc0")),
        ({"text": "User: a\r\n\n\nb "}, {}, ("User: a\r\n\n\nb ", "User: a\r\n\n\nb 0")),
        ({"messages": TURNS, "text": "no"}, {}, CHAT),
        ({"chat": TURNS}, {"messages_column": "chat"}, CHAT),
        ({"conversations": SHARE}, {}, CHAT),
        ({"conversations": SHARE, "system": "S"}, {}, ("System: S\n\nUser: q\n\nAssistant: a", " a0")),
        ({"prompt": "q", "completion": "a"}, {}, CHAT),
        ({"prompt": "q", "response": "a"}, {}, CHAT),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, CHAT),
        ({"x": "q", "y": "a", "text": "no"}, {"prompt_column": "x", "response_column": "y"}, CHAT),
        ({"x": b"q", "y": b"a"}, {"prompt_column": "x", "response_column": "y"}, CHAT),
        ({"instruction": "i", "input": "", "output": "o"}, {}, ("Instruction: i\n\nResponse: o", " o0")),
        (
            {"instruction": "i", "input": "m", "output": "o"},
            {},
            ("Instruction: i\n\nInput: m\n\nResponse: o", " o0"),
        ),
        ({"instruction": "i", "input": "m", "output": "o"}, {"template": "raw"}, ("i\nmo", "o0")),
        ({"prompt": "q\n\n", "completion": "a"}, {"template": "raw"}, ("q\n\na", "a0")),
        ({"messages": None, "text": "abc"}, {}, ("abc", "abc0")),
        ({"messages": TURNS}, {"target_roles": ("user",)}, ("User: q\n\nAssistant: a", " q\n\n")),
        ({"messages": TURNS * 2}, {"target_turns": "last"}, (f"{CHAT[0]}\n\n{CHAT[0]}", " a0")),
        ({"input_ids": [98, 99, 0]}, {}, ("ab", "ab0")),
        ({"input_ids": [98, 99, 100]}, {}, ("abc", "abc0")),
        ({"input_ids": [98, 99, 100], "labels": [-100, 99, 100]}, {}, ("abc", "bc0")),
        ({"input_ids": [98, 99, 0], "labels": [-100, 99, -100]}, {}, ("ab", "b")),
    ],
)
def test_record_shapes(fields, data, want):
    assert read(fields, **data) == want


def test_reasoning_is_dropped_on_request():
    turns = [TURNS[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    assert read({"messages": turns}, thinking="drop") == CHAT
    assert read({"messages": turns})[0] == "User: q\n\nAssistant: <think>\nhm\n</think>\na"


def test_jinja_template_file(tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = str(tmp_path / "t.jinja")
    assert read({"messages": TURNS}, template=template) == ("[user]q[assistant]a", "a0")
    assert read({"instruction": "i", "input": "m", "output": "o"}, template=template)[0] == "[user]i\nm[assistant]o"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"input_ids": "abc"}, "column 'input_ids' must hold a list of integers, got 'abc'"),
        ({"input_ids": [1, True]}, "must hold a list of integers"),
        ({"input_ids": [1, -2]}, "holds the negative token -2"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values for 2 tokens"),
        ({"instruction": "i", "output": 5}, "column 'output' must hold text, got int"),
        ({"text": b"\xff"}, r"column 'text' is not UTF-8 \(byte 0xff\)"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"f": 1}]}]}, "tool_calls must hold"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments of f are not JSON",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": 3}]}, "reasoning of a message must be text"),
        ({}, "the columns are none"),
    ],
)
def test_wrong_records(fields, problem):
    with pytest.raises(UserError, match=problem):
        read(fields)


def test_long_values_are_cut_in_messages():
    with pytest.raises(UserError) as caught:
        read({"messages": [{"role": "x" * 10_000, "content": ""}]})
    assert len(str(caught.value)) < 400
