"""A chat template of the user's own (the Jinja kind of Hugging Face tokenizers) -> spans.

Which text belongs to a turn is found by rendering the conversation with and without it, so any template
works that only ever appends, and the border of a reply is exactly where the generation prompt of inference
ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_accel.data.messages import Turn, read_turns
from rwkv_accel.data.template import Span, target_indices
from rwkv_accel.errors import UserError


class JinjaTemplate:
    """A compiled .jinja file. Raises UserError if it cannot be read or compiled."""

    def __init__(self, path: str | Path) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._raise
        self._path, self._errors = Path(path), jinja2.TemplateError
        try:
            source = self._path.read_text(encoding="utf-8")
            self._template = environment.from_string(source)
        except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
            raise UserError(f"data.template {path} cannot be used: {error}") from None
        self._knows_reasoning = "reasoning_content" in source

    def render(
        self,
        messages: object,
        *,
        tools: object = None,
        target_roles: Sequence[str] = ("assistant",),
        target_turns: str = "all",
        thinking: str = "keep",
    ) -> list[Span]:
        """Spans of a conversation. A reply's span is all that the template puts after its generation
        prompt."""
        turns = read_turns(messages)
        listed = [self._message(turn, thinking) for turn in turns]
        targets = target_indices(turns, target_roles, target_turns)
        spans: list[Span] = []
        done = ""
        after_reply = False
        for index, turn in enumerate(turns):
            is_reply = turn.role == "assistant"
            if is_reply:
                prompt = self._text(listed[:index], tools, generation=True)
                spans.append(Span(self._new_part(prompt, done, index), False, after_reply))
                done, after_reply = prompt, False
            text = self._text(listed[: index + 1], tools, generation=False)
            spans.append(Span(self._new_part(text, done, index), index in targets, is_reply or after_reply))
            done, after_reply = text, is_reply
        return spans

    def prompt(self, question: str) -> str:
        """What inference feeds the model for one question."""
        return self._text([{"role": "user", "content": question}], None, generation=True)

    def _text(self, messages: list[dict[str, str]], tools: object, *, generation: bool) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=generation, bos_token="", eos_token=""
            )
        except (self._errors, TypeError) as error:
            raise UserError(f"data.template {self._path}: {error}") from None

    def _new_part(self, text: str, done: str, index: int) -> str:
        if not text.startswith(done):
            raise UserError(
                f"data.template {self._path} rewrites earlier text when message {index + 1} is added; a template for "
                "training must only append"
            )
        return text[len(done) :]

    def _raise(self, message: str) -> None:
        raise self._errors(message)

    def _message(self, turn: Turn, thinking: str) -> dict[str, Any]:
        """A turn as templates expect it. One that knows no `reasoning_content` would lose it without a word."""
        if not self._knows_reasoning:
            return {"role": turn.role, "content": turn.with_reasoning(thinking)}
        message = {"role": turn.role, "content": turn.text}
        if turn.reasoning is not None and thinking != "drop":
            message["reasoning_content"] = turn.reasoning
        return message
