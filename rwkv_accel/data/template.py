"""The official RWKV chat form, as spans of text that know whether the loss counts them.

    System: ...\\n\\nUser: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant: ...<end of text>

A blank line separates turns, so user and system text loses its own (RWKV-LM RWKV7-G1x-templates.txt). At
inference the prompt ends right after `Assistant:` and the model itself produces the space, so the reply's
span starts with it. Prompts that ask for reasoning end with `Assistant: <think`, without the bracket that
closes the tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rwkv_accel.data.messages import Turn, read_turns
from rwkv_accel.data.tokenizer import Tokenizer

TURN_END = "\n\n"
THINK, FAST_THINK = "Assistant: <think", "Assistant: <think>\n</think"
HEADS = {"system": "System:", "user": "User:", "tool": "User:", "assistant": "Assistant:"}


class Span(NamedTuple):
    """A piece of a document."""

    text: str
    is_target: bool
    starts_segment: bool = False
    """No token reaches from the text before into this one: the two are tokenised apart, as inference does it
    between the prompt and the reply."""


def render(
    messages: object,
    *,
    tools: object = None,
    target_roles: Sequence[str] = ("assistant",),
    target_turns: Literal["all", "last"] = "all",
    thinking: Literal["keep", "drop", "fast"] = "keep",
) -> list[Span]:
    """Spans of a conversation of {role, content}, by default with the assistant's replies as targets.

    A turn's span covers the blank line that ends it: that is how the model hands over within a conversation.
    After the last turn encode_spans appends end of text instead.

    Raises:
        UserError: not a list of messages, an unknown role, or content that is not text.
    """
    turns = read_turns(messages, tools)
    targets = target_indices(turns, target_roles, target_turns)
    spans: list[Span] = []
    after_reply = False
    for index, turn in enumerate(turns):
        is_reply = turn.role == "assistant"
        head, body = _render_reply(turn, thinking) if is_reply else _render_other(turn)
        end = TURN_END if index < len(turns) - 1 else ""
        spans.append(Span(head, False, after_reply))
        spans.append(Span(body + end, index in targets, is_reply))
        after_reply = is_reply
    return spans


def render_raw(
    messages: object,
    *,
    target_roles: Sequence[str] = ("assistant",),
    target_turns: str = "all",
    thinking: str = "keep",
) -> list[Span]:
    """Spans of the turns' texts side by side: no role names, nothing added and nothing cleaned.

    Reasoning in a field of its own stands before the reply as a think block.
    """
    turns = read_turns(messages)
    targets = target_indices(turns, target_roles, target_turns)
    replies = [turn.role == "assistant" for turn in turns]
    borders = [is_reply or (index > 0 and replies[index - 1]) for index, is_reply in enumerate(replies)]
    return [Span(turn.with_reasoning(thinking), index in targets, borders[index]) for index, turn in enumerate(turns)]


def render_instruction(instruction: str, material: str, response: str) -> list[Span]:
    """The official instruction form; the response is the target."""
    head = f"Instruction: {clean_turn(instruction)}{TURN_END}"
    if material.strip():
        head += f"Input: {clean_turn(material)}{TURN_END}"
    return [Span(f"{head}Response:", False), Span(f" {_clean_reply(response)}", True, True)]


def chat_prompt(question: str, system: str | None = None, *, thinking: Literal["off", "think", "fast"] = "off") -> str:
    """What inference feeds the model for one question; it ends where the reply's first token begins."""
    head = f"System: {clean_turn(system)}{TURN_END}" if system else ""
    end = {"off": HEADS["assistant"], "think": THINK, "fast": FAST_THINK}[thinking]
    return f"{head}User: {clean_turn(question)}{TURN_END}{end}"


def clean_turn(text: str) -> str:
    """User or system text without blank lines, which would end the turn, and without outer white space."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def encode_spans(tokenizer: Tokenizer, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Tokens and target flags of a document, end of text included (a target if the last span is one)."""
    ids: list[int] = []
    mask: list[bool] = []
    segment: list[tuple[str, bool]] = []
    for span in spans:
        if span.starts_segment and segment:
            _append_segment(tokenizer, segment, ids, mask)
            segment = []
        segment.append((span.text, span.is_target))
    _append_segment(tokenizer, segment, ids, mask)
    if not ids or ids[-1] != tokenizer.eot_id:
        ids.append(tokenizer.eot_id)
        mask.append(bool(spans) and spans[-1].is_target)
    return ids, mask


def target_indices(turns: Sequence[Turn], target_roles: Sequence[str], target_turns: str) -> set[int]:
    """Which turns are targets."""
    chosen = [i for i, turn in enumerate(turns) if turn.role in target_roles and turn.is_trained]
    return set(chosen[-1:] if target_turns == "last" else chosen)


def _append_segment(tokenizer: Tokenizer, segment: list[tuple[str, bool]], ids: list[int], mask: list[bool]) -> None:
    new_ids, new_mask = tokenizer.encode_spans(segment)
    ids += new_ids
    mask += new_mask


def _render_other(turn: Turn) -> tuple[str, str]:
    text = f"Function output:\n{turn.text}" if turn.role == "tool" else turn.text
    return HEADS[turn.role], f" {clean_turn(text)}"


def _render_reply(turn: Turn, thinking: str) -> tuple[str, str]:
    """(what the prompt ends with, what the model writes)."""
    reply = _clean_reply(turn.text)
    if turn.reasoning is not None and thinking != "drop":
        reasoning = _clean_reply(turn.reasoning)
        return THINK, f">\n{reasoning}\n</think>\n{reply}" if reasoning else f">\n</think>\n{reply}"
    if thinking == "fast":
        return FAST_THINK, f">\n{reply}"
    return HEADS["assistant"], f" {reply}"


def _clean_reply(text: str) -> str:
    return text.replace("\r\n", "\n").strip()
