"""Conversations as data sets have them (OpenAI messages, ShareGPT) -> turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rwkv_accel.errors import UserError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "gpt_ignore": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    text: str
    reasoning: str | None = None
    """What the assistant thought before the reply."""
    content: str = ""
    """The text as the data set has it: with a think block at its head, if it has one there."""
    is_trained: bool = True
    """False where the data set itself excludes the turn (`weight` 0, `gpt_ignore`)."""

    def with_reasoning(self, thinking: str) -> str:
        """The text with its reasoning in a think block, as it stands in the data set if it stands there."""
        if self.reasoning is None or thinking == "drop":
            return self.text
        return self.content if self.content != self.text else f"<think>{self.reasoning}</think>{self.text}"


def read_turns(messages: object, tools: object = None) -> list[Turn]:
    """Turns of a list of {role, content} or {from, value}; empty system turns are dropped.

    tools: function descriptions, which join the system turn.

    Raises:
        UserError: not a list of messages, an unknown role, or content that is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError(f"messages must be a non-empty list of {{role, content}}, got {shown(messages)}")
    turns = [_read_turn(message) for message in messages]
    if tools:
        turns = _with_tools(turns, tools)
    return [turn for turn in turns if turn.role != "system" or turn.text.strip()]


def shown(value: Any) -> str:
    """A value in an error message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError(f"a message must be {{role, content}}, got {shown(message)}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role is None or (content is None and not message.get("tool_calls")):
        raise UserError(f"a message must be {{role, content}}, got {shown(message)}")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"role {shown(role)} is unknown; use one of {', '.join(ROLES)}")
    text = _text_of(content, role)
    if role == "function_call":
        text = f"```json\n{text}\n```"
    if message.get("tool_calls"):
        text = "\n".join(filter(None, (text, _calls(message["tool_calls"]))))
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"the reasoning of a message must be text, got {shown(reasoning)}")
    content = text
    block = THINK_BLOCK.fullmatch(text) if ROLES[role] == "assistant" and reasoning is None else None
    if block:
        reasoning, text = block[1], block[2]
    trained = role != "gpt_ignore" and message.get("weight") != 0
    return Turn(ROLES[role], text, reasoning, content, trained)


def _text_of(content: Any, role: str) -> str:
    """Plain text, or the parts of type text of the OpenAI list form."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise UserError(f"the content of a {role} message must be text, got {shown(content)}")


def _calls(tool_calls: Any) -> str:
    """Function calls as the JSON block that the official template has the model write."""
    try:
        calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in tool_calls]
    except (TypeError, KeyError):
        raise UserError(f"tool_calls must hold {{function: {{name, arguments}}}}, got {shown(tool_calls)}") from None
    for call in calls:
        if isinstance(call["arguments"], str):
            try:
                call["arguments"] = json.loads(call["arguments"])
            except json.JSONDecodeError:
                raise UserError(f"arguments of {call['name']} are not JSON: {shown(call['arguments'])}") from None
    return f"```json\n{json.dumps(calls, ensure_ascii=False)}\n```"


def _with_tools(turns: list[Turn], tools: object) -> list[Turn]:
    listed = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    text = f"You can call these functions: {listed}\nTo call functions, reply only with a JSON list of name, arguments."
    if turns[0].role == "system":
        text = f"{turns[0].text}\n{text}"
        return [replace(turns[0], text=text, content=text), *turns[1:]]
    return [Turn("system", text, content=text), *turns]
