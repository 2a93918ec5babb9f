"""Records -> documents: which columns hold the text, how it is rendered, its tokens and target flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.jinja_template import JinjaTemplate
from rwkv_accel.data.messages import shown
from rwkv_accel.data.sources import Record
from rwkv_accel.data.template import Span, encode_spans, render, render_instruction, render_raw
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

REMEDY = "repair it, or set data.on_bad_line=skip"
CONVERSATIONS, TOKENS = "conversations", "input_ids"
PAIRS = (("prompt", "completion"), ("prompt", "response"))


class WrongColumns(UserError):
    """The record is sound, but the recipe names other columns."""


@dataclass
class ReadReport:
    """What was left out while reading."""

    num_skipped: int = 0
    """Records that could not be used."""
    first_skipped: str = ""
    """Place and reason of the first of them."""

    def skip(self, problem: str) -> None:
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or problem


@dataclass(frozen=True)
class Document:
    """One document: tokens with end of text, and the flag of each."""

    place: str
    ids: list[int]
    is_target: list[bool]
    spans: list[Span] = field(default_factory=list)
    """The text it was made of; empty for records that come as tokens."""


class DocumentReader:
    """Turns records into documents as the recipe's data section says."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._is_chat = data.template == "rwkv"
        self._render: Callable[..., list[Span]]
        choice: dict[str, Any] = {"target_roles": data.target_roles, "target_turns": data.target_turns}
        if self._is_chat:
            self._render = partial(render, thinking=data.thinking, **choice)
        elif data.template == "raw":
            self._render = partial(render_raw, thinking=data.thinking, **choice)
        else:
            self._render = partial(JinjaTemplate(data.template).render, thinking=data.thinking, **choice)

    def documents(self, records: Iterable[Record], report: ReadReport) -> Iterator[Document]:
        """Documents in the order of the records.

        Raises:
            UserError: a record cannot be used, unless data.on_bad_line is skip; it is named by its place.
        """
        for record in records:
            try:
                if record.fields is None:
                    raise UserError(record.problem)
                yield self.document(record.place, record.fields)
            except UserError as error:
                if self._data.on_bad_line == "stop":
                    remedy = "" if isinstance(error, WrongColumns) else f"; {REMEDY}"
                    raise UserError(f"{record.place}: {error}{remedy}") from None
                report.skip(f"{record.place}: {error}")

    def document(self, place: str, fields: Mapping[str, Any]) -> Document:
        """One record as tokens. Raises UserError if no known column is there, or one holds the wrong type."""
        if fields.get(TOKENS) is not None and self._data.prompt_column is None:
            return Document(place, *self._read_tokens(fields))
        spans = self._spans(fields)
        return Document(place, *encode_spans(self._tokenizer, spans), spans)

    def _spans(self, fields: Mapping[str, Any]) -> list[Span]:
        data = self._data
        if data.prompt_column is not None and data.response_column is not None:
            return self._pair(fields, data.prompt_column, data.response_column)
        for name in (data.messages_column, CONVERSATIONS):
            if fields.get(name) is not None:
                return self._conversation(fields, name)
        if fields.get(data.text_column) is not None:
            return [Span(_text(fields, data.text_column), True)]
        if fields.get("instruction") is not None and "output" in fields:
            return self._instruction(fields)
        for prompt, response in PAIRS:
            if fields.get(prompt) is not None and response in fields:
                return self._pair(fields, prompt, response)
        for name in (data.messages_column, CONVERSATIONS, data.text_column, "instruction", *(p for p, _ in PAIRS)):
            if name in fields and fields[name] is None:
                raise UserError(f"column {name!r} is null")
        raise WrongColumns(
            f"no column {data.text_column!r} or {data.messages_column!r}, and no known pair; the columns are "
            f"{_names(fields)}: {_which_keys(fields)}"
        )

    def _conversation(self, fields: Mapping[str, Any], name: str) -> list[Span]:
        messages, system = fields[name], fields.get("system")
        if isinstance(system, str) and system and isinstance(messages, list):
            messages = [{"role": "system", "content": system}, *messages]
        if self._data.template == "raw":
            return self._render(messages)
        return self._render(messages, tools=fields.get("tools"))

    def _pair(self, fields: Mapping[str, Any], prompt: str, response: str) -> list[Span]:
        if isinstance(fields.get(prompt), list) and isinstance(fields.get(response), list):
            return self._render([*fields[prompt], *fields[response]])
        turns = (("user", prompt), ("assistant", response))
        return self._render([{"role": role, "content": _text(fields, name)} for role, name in turns])

    def _instruction(self, fields: Mapping[str, Any]) -> list[Span]:
        instruction, response = _text(fields, "instruction"), _text(fields, "output")
        material = _text(fields, "input") if fields.get("input") is not None else ""
        if self._is_chat:
            return render_instruction(instruction, material, response)
        question = f"{instruction}\n{material}" if material else instruction
        return self._render([{"role": "user", "content": question}, {"role": "assistant", "content": response}])

    def _read_tokens(self, fields: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Columns `input_ids` and, optionally, `labels` of the same length with -100 where nothing is a
        target."""
        ids, labels = _integers(fields, TOKENS), [0]
        if fields.get("labels") is None:
            mask = [True] * len(ids)
        else:
            labels = _integers(fields, "labels")
            if len(labels) != len(ids):
                raise UserError(f"column 'labels' has {len(labels)} values for {len(ids)} tokens")
            mask = [label != -100 for label in labels]
        if min(ids, default=0) < 0:
            raise UserError(f"column {TOKENS!r} holds the negative token {min(ids)}")
        if not ids or ids[-1] != self._tokenizer.eot_id:
            ids, mask = [*ids, self._tokenizer.eot_id], [*mask, not mask or mask[-1]]
        return ids, mask


def _integers(fields: Mapping[str, Any], name: str) -> list[int]:
    value = fields[name]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise UserError(f"column {name!r} must hold a list of integers, got {shown(value)}")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise WrongColumns(f"no column {name!r}; the columns are {_names(fields)}")
    value = fields[name]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"column {name!r} is not UTF-8 (byte {value[error.start]:#04x})") from None
    if value is None:
        raise UserError(f"column {name!r} is null")
    if not isinstance(value, str):
        raise UserError(f"column {name!r} must hold text, got {type(value).__name__}")
    return value


def _which_keys(fields: Mapping[str, Any]) -> str:
    """The keys of the recipe that could name these columns, ready to be copied where the columns tell."""
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    lists = [name for name, value in fields.items() if isinstance(value, list)]
    if lists:
        return f"set data.messages_column={lists[0]} if that holds the turns, or data.text_column"
    if len(texts) == 1:
        return f"set data.text_column={texts[0]}"
    if len(texts) > 1:
        pair = f"data.prompt_column={texts[0]} data.response_column={texts[1]}"
        return f"set {pair} if these are question and reply, or data.text_column"
    return "set data.text_column, data.messages_column, or data.prompt_column with data.response_column"


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "none"
