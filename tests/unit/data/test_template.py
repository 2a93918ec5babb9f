"""The chat template: text, token borders and target flags, written out by hand."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_accel.data.jinja_template import JinjaTemplate
from rwkv_accel.data.template import (
    Span,
    chat_prompt,
    encode_spans,
    render,
    render_instruction,
    render_raw,
)
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError

WORLD = build_tokenizer("world")
BYTE = build_tokenizer("byte")
USER, ASSISTANT, SYSTEM = [24281, 59], [5585, 41693, 59], [40812, 59]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def text_of(spans):
    return "".join(span.text for span in spans)


def test_one_turn_token_by_token():
    ids, mask = encode_spans(WORLD, render(chat(("user", "Hello world!"), ("assistant", "你好"))))
    hello = WORLD.encode(" Hello world!")
    reply = [33, 10464, 11685]
    assert ids == [*USER, *hello, 261, *ASSISTANT, *reply, 0]
    assert mask == [False] * (2 + len(hello) + 1 + 3) + [True] * 4


def test_many_turns_with_system_text():
    messages = chat(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert render(messages) == [
        Span("System:", False, False),
        Span(" Be brief.\n\n", False, False),
        Span("User:", False, False),
        Span(" a\n\n", False, False),
        Span("Assistant:", False, False),
        Span(" b\n\n", True, True),
        Span("User:", False, True),
        Span(" c\n\n", False, False),
        Span("Assistant:", False, False),
        Span(" d", True, True),
    ]
    ids, mask = encode_spans(BYTE, render(messages))
    shown = BYTE.decode(ids).replace("\n", "/") + "0"
    marked = "".join("^" if flag else "." for flag in mask)
    assert shown == "System: Be brief.//User: a//Assistant: b//User: c//Assistant: d0"
    assert marked == "......................................^^^^...................^^^"


def test_conversation_that_ends_with_the_user_has_no_target_at_the_end():
    ids, mask = encode_spans(WORLD, render(chat(("assistant", "Hi"), ("user", "Hello"))))
    assert ids[-1] == 0
    assert mask[-1] is False
    assert WORLD.decode(i for i, m in zip(ids, mask) if m) == " Hi\n\n"


def test_blank_lines_leave_the_user_turn_but_not_the_reply():
    spans = render(chat(("user", " a\r\n\r\n\nb\n"), ("assistant", "\nc\r\n\r\nd \n")))
    assert text_of(spans) == "User: a\nb\n\nAssistant: c\n\nd"


def test_training_tokens_begin_with_the_inference_prompt():
    for question, reply in [("What?", "\uff1a“yes”"), ("x。", "> quote"), ("", ""), ("a:", ')"')]:
        ids, mask = encode_spans(WORLD, render(chat(("user", question), ("assistant", reply))))
        prompt = WORLD.encode(chat_prompt(question))
        assert ids[: len(prompt)] == prompt
        assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_later_turns_are_tokenised_as_the_whole_text_is():
    # The model reads its own history as one text; "。\n" is one token of it.
    messages = chat(("user", "甲。"), ("assistant", "乙。"), ("user", "丙。"), ("assistant", "丁。"))
    ids, _ = encode_spans(WORLD, render(messages))
    assert ids == [*WORLD.encode("User: 甲。\n\nAssistant: 乙。\n\nUser: 丙。\n\nAssistant: 丁。"), 0]


def test_chat_prompt_with_system():
    assert chat_prompt("a\n\nb", "c\n\nd ") == "System: c\nd\n\nUser: a\nb\n\nAssistant:"


def test_share_gpt_role_names():
    messages = chat(("human", "a"), ("gpt", "b"))
    assert render(messages) == render(chat(("user", "a"), ("assistant", "b")))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "non-empty list"),
        ("hello", "got 'hello'"),
        ([{"role": "user"}], "must be {role, content}"),
        (["hi"], "got 'hi'"),
        (chat(("bot", "x")), "role 'bot' is unknown; use one of system, developer, user"),
        (chat(("user", 3)), "must be text, got 3"),
    ],
)
def test_bad_messages(messages, problem):
    with pytest.raises(UserError, match=problem):
        render(messages)


TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20)), min_size=1)


@settings(max_examples=150, deadline=None)
@given(TURNS)
def test_targets_decode_to_the_replies_and_end_of_text(turns):
    for tokenizer in (WORLD, BYTE):
        ids, mask = encode_spans(tokenizer, render(chat(*turns)))
        want = b""
        spoken = [turn for turn in turns if turn[0] != "system" or turn[1].strip()]
        for index, (role, content) in enumerate(spoken):
            if role == "assistant":
                end = "\n\n" if index < len(spoken) - 1 else ""
                want += f" {content.replace(chr(13) + chr(10), chr(10)).strip()}{end}".encode()
        assert tokenizer.decode_bytes(i for i, m in zip(ids, mask) if m) == want
        assert ids[-1] == 0
        assert mask[-1] == (bool(spoken) and spoken[-1][0] == "assistant")
        assert 0 not in ids[:-1]


def targets_of(messages, template=render, **choice):
    """The runs of targets as text, joined by "|"; 0 stands for end of text."""
    ids, mask = encode_spans(BYTE, template(messages, **choice))
    runs = groupby(zip(ids, mask), key=lambda pair: pair[1])
    texts = [[index for index, _ in run] for is_target, run in runs if is_target]
    return "|".join(BYTE.decode(run) + "0" * run.count(0) for run in texts)


LONG_CHAT = chat(("system", "S"), ("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2"))


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({}, " a1\n\n| a20"),
        ({"target_turns": "last"}, " a20"),
        ({"target_roles": ("user",)}, " u1\n\n| u2\n\n"),
        ({"target_roles": ("user", "assistant")}, " u1\n\n| a1\n\n| u2\n\n| a20"),
        ({"target_roles": ("system",)}, " S\n\n"),
        ({"target_roles": ("user",), "target_turns": "last"}, " u2\n\n"),
        ({"target_roles": ("tool",)}, ""),
    ],
)
def test_which_roles_and_turns_are_targets(choice, want):
    assert targets_of(LONG_CHAT, **choice) == want


def test_tokens_do_not_depend_on_the_choice_of_targets():
    plain, _ = encode_spans(WORLD, render(LONG_CHAT))
    for roles in (("user",), ("system", "user", "assistant"), ("tool",)):
        assert encode_spans(WORLD, render(LONG_CHAT, target_roles=roles))[0] == plain


THOUGHTS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a", "reasoning_content": "hm\n\nso"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
]


@pytest.mark.parametrize(
    ("thinking", "text", "targets"),
    [
        (
            "keep",
            "User: q\n\nAssistant: <think>\nhm\n\nso\n</think>\na\n\nUser: r\n\nAssistant: b",
            ">\nhm\n\nso\n</think>\na\n\n| b0",
        ),
        ("drop", "User: q\n\nAssistant: a\n\nUser: r\n\nAssistant: b", " a\n\n| b0"),
        (
            "fast",
            "User: q\n\nAssistant: <think>\nhm\n\nso\n</think>\na\n\nUser: r\n\nAssistant: <think>\n</think>\nb",
            ">\nhm\n\nso\n</think>\na\n\n|>\nb0",
        ),
    ],
)
def test_thinking(thinking, text, targets):
    assert text_of(render(THOUGHTS, thinking=thinking)) == text
    assert targets_of(THOUGHTS, thinking=thinking) == targets


def test_think_block_inside_the_reply_is_reasoning_too():
    inline = [THOUGHTS[0], {"role": "assistant", "content": "<think>hm\n\nso</think>\n\na"}, *THOUGHTS[2:]]
    assert render(inline) == render(THOUGHTS)
    empty = chat(("user", "q"), ("assistant", "<think>\n</think>\na"))
    assert text_of(render(empty)) == "User: q\n\nAssistant: <think>\n</think>\na"


@pytest.mark.parametrize(("prompt", "choice"), [("think", "keep"), ("fast", "fast")])
def test_thinking_prompts_are_what_training_saw(prompt, choice):
    reply = {"role": "assistant", "content": "a", **({"reasoning": "hm"} if prompt == "think" else {})}
    ids, mask = encode_spans(WORLD, render([{"role": "user", "content": "q"}, reply], thinking=choice))
    assert [i for i, m in zip(ids, mask) if not m] == WORLD.encode(chat_prompt("q", thinking=prompt))
    # The bracket starts a token of the reply, not one that reaches into the prompt.
    assert WORLD.decode(ids[mask.index(True) :]).startswith(">\n")


def test_tools():
    tools = [{"name": "add"}]
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": '{"sum":\n\n3}'},
        {"role": "assistant", "content": "3"},
    ]
    call = '```json\n[{"name": "add", "arguments": {"a": 1}}]\n```'
    assert text_of(render(messages, tools=tools)) == (
        'System: You can call these functions: [{"name": "add"}]\n'
        "To call functions, reply only with a JSON list of name, arguments.\n\n"
        f'User: 1+2?\n\nAssistant: {call}\n\nUser: Function output:\n{{"sum":\n3}}\n\nAssistant: 3'
    )
    assert targets_of(messages) == f" {call}\n\n| 30"
    assert targets_of(messages, target_roles=("tool",)) == ' Function output:\n{"sum":\n3}\n\n'


def test_turns_that_the_data_set_excludes():
    messages = [
        {"from": "human", "value": "q"},
        {"from": "gpt_ignore", "value": "bad"},
        {"from": "human", "value": "r"},
        {"from": "gpt", "value": "good"},
    ]
    assert targets_of(messages) == " good0"
    assert targets_of([*chat(("user", "q")), {"role": "assistant", "content": "x", "weight": 0}]) == ""


def test_list_content_and_empty_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of(render([{"role": "system", "content": " "}, {"role": "user", "content": parts}])) == "User: ab"
    with pytest.raises(UserError, match="must be text"):
        render([{"role": "user", "content": [{"type": "image_url"}]}])


def test_raw_template_adds_nothing():
    assert render_raw(chat(("user", "q\n\n"), ("assistant", " a"), ("user", "r"))) == [
        Span("q\n\n", False, False),
        Span(" a", True, True),
        Span("r", False, True),
    ]


def test_instruction_form():
    assert render_instruction("Add.\n\nNow.", "1 2\n", " 3\n") == [
        Span("Instruction: Add.\nNow.\n\nInput: 1 2\n\nResponse:", False),
        Span(" 3", True, True),
    ]
    assert render_instruction("Add.", " ", "3")[0].text == "Instruction: Add.\n\nResponse:"


CHATML = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def jinja(tmp_path, text):
    (tmp_path / "t.jinja").write_text(text)
    return JinjaTemplate(tmp_path / "t.jinja")


def test_jinja_template(tmp_path):
    spans = jinja(tmp_path, CHATML).render(chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))
    assert spans == [
        Span("<|user|>\nq<|end|>\n", False, False),
        Span("<|assistant|>\n", False, False),
        Span("a<|end|>\n", True, True),
        Span("<|user|>\nr<|end|>\n", False, True),
        Span("<|assistant|>\n", False, False),
        Span("b<|end|>\n", True, True),
    ]


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({}, "a1<|end|>\n|a2<|end|>\n0"),
        ({"target_turns": "last"}, "a2<|end|>\n0"),
        ({"target_roles": ("user",)}, "<|user|>\nu1<|end|>\n|<|user|>\nu2<|end|>\n"),
        ({"target_roles": ("system",)}, "<|system|>\nS<|end|>\n"),
        ({"target_roles": ("tool",)}, ""),
    ],
)
def test_roles_of_a_jinja_template(tmp_path, choice, want):
    assert targets_of(LONG_CHAT, jinja(tmp_path, CHATML).render, **choice) == want


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({}, "a1|a20"),
        ({"target_turns": "last"}, "a20"),
        ({"target_roles": ("user",)}, "u1|u2"),
        ({"target_roles": ("user", "assistant")}, "u1a1u2a20"),
        ({"target_roles": ("system",)}, "S"),
    ],
)
def test_roles_of_the_raw_template(choice, want):
    assert targets_of(LONG_CHAT, render_raw, **choice) == want


@settings(max_examples=60, deadline=None)
@given(TURNS)
def test_targets_of_raw_and_jinja_decode_to_the_replies(tmp_path_factory, turns):
    template = jinja(tmp_path_factory.getbasetemp(), CHATML)
    spoken = [turn for turn in turns if turn[0] != "system" or turn[1].strip()]
    replies = [content for role, content in spoken if role == "assistant"]
    for shape, want in (
        (render_raw, "".join(replies)),
        (template.render, "".join(f"{reply}<|end|>\n" for reply in replies)),
    ):
        ids, mask = encode_spans(WORLD, shape(chat(*turns)))
        assert WORLD.decode_bytes(i for i, m in zip(ids, mask) if m) == want.encode()
        assert ids[-1] == 0


def test_no_template_loses_reasoning(tmp_path):
    inline = chat(("user", "q"), ("assistant", "\n<think>hm</think> a"))
    apart = [*inline[:1], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    plain = jinja(tmp_path, CHATML).render
    assert targets_of(inline, render_raw) == "\n<think>hm</think> a0"
    assert targets_of(apart, render_raw) == "<think>hm</think>a0"
    assert targets_of(inline, render_raw, thinking="drop") == " a0"
    assert targets_of(inline, plain) == "\n<think>hm</think> a<|end|>\n0"
    assert targets_of(apart, plain, thinking="drop") == "a<|end|>\n0"
    knowing = jinja(tmp_path, CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}~{{ m.content }}")).render
    assert targets_of(inline, knowing) == "hm~ a<|end|>\n0"


def test_jinja_template_that_rewrites_history_is_refused(tmp_path):
    template = jinja(tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="rewrites earlier text when message 2 is added"):
        template.render(chat(("user", "q"), ("assistant", "a")))


def test_jinja_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        jinja(tmp_path, "{% for %}")
    with pytest.raises(UserError, match="no system please"):
        jinja(tmp_path, "{{ raise_exception('no system please') }}").render(chat(("system", "s")))
    with pytest.raises(UserError, match="No such file"):
        JinjaTemplate(tmp_path / "absent.jinja")
    with pytest.raises(UserError, match="unsafe"):
        jinja(tmp_path, "{{ messages.__class__.__mro__ }}").render(chat(("user", "s")))
