"""Records of a task file -> prompts and answers, in the words of the recipe's template.

A record has `prompt` or `question` (text), and

- for multiple choice `choices` (texts; also {"text": [...], "label": [...]}) and `answer`: the number of the right one
  from 0, its label (A, B, ... where the file has none), or its text;
- for exact match `answer`: a text or number, or a list of them if several are right.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.documents import Document, DocumentReader
from rwkv_accel.data.messages import shown
from rwkv_accel.data.sources import find_sources, read_records
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

PROMPT_KEYS = ("prompt", "question")
Example = TypeVar("Example")


@dataclass(frozen=True)
class Choice:
    """One way to go on after a prompt."""

    prefix: tuple[int, ...]
    """Tokens of the prompt; the choices of an example normally share them."""
    ids: tuple[int, ...]
    """Tokens of the choice, without end of text."""
    num_bytes: int
    """Bytes of the choice's own text."""


@dataclass(frozen=True)
class ChoiceExample:
    """A question and its choices."""

    place: str
    choices: tuple[Choice, ...]
    answer: int
    """Number of the right one."""


@dataclass(frozen=True)
class AnswerExample:
    """A question and its right answers."""

    place: str
    prompt: str
    """What the model reads."""
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TaskSet:
    """One file of examples of one kind."""

    name: str
    examples: tuple[Any, ...]


def read_choices(name: str, path: str, data: DataConfig, tokenizer: Tokenizer, limit: int | None) -> TaskSet:
    """A multiple-choice file as the set `name`. Raises UserError that names file and line."""
    reader = _PromptReader(data, tokenizer)

    def example(place: str, fields: Mapping[str, Any]) -> ChoiceExample:
        prompt = _prompt(fields)
        texts, answer = _choices(fields)
        return ChoiceExample(place, tuple(reader.choice(place, prompt, text) for text in texts), answer)

    return TaskSet(name, _read(path, data, limit, example))


def read_answers(name: str, path: str, data: DataConfig, tokenizer: Tokenizer, limit: int | None) -> TaskSet:
    """A file of questions with answers as the set `name`. Raises UserError that names file and line."""
    reader = _PromptReader(data, tokenizer)

    def example(place: str, fields: Mapping[str, Any]) -> AnswerExample:
        value = fields.get("answer")
        values = value if isinstance(value, list) else [value]
        answers = tuple(str(v) for v in values if isinstance(v, str | int | float) and str(v).strip())
        if not answers or len(answers) != len(values):
            raise UserError(f'"answer" must be a text, a number, or a list of them, got {shown(value)}')
        return AnswerExample(place, reader.prompt(place, _prompt(fields), answers[0]), answers)

    return TaskSet(name, _read(path, data, limit, example))


class _PromptReader:
    """The template of the data section, for one question at a time."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        columns = {"prompt_column": "prompt", "response_column": "response"}
        roles = {"target_roles": ("assistant",), "target_turns": "all"}
        self._reader = DocumentReader(data.model_copy(update={**columns, **roles}), tokenizer)

    def choice(self, place: str, prompt: str, text: str) -> Choice:
        document = self._document(place, prompt, text)
        first = document.is_target.index(True)
        ids = tuple(document.ids[first:-1])  # the last one is end of text
        if not ids:
            raise UserError(f"choice {text!r} has no token")
        return Choice(tuple(document.ids[:first]), ids, len(text.encode("utf-8")))

    def prompt(self, place: str, prompt: str, answer: str) -> str:
        spans = self._document(place, prompt, answer).spans
        first = next(index for index, span in enumerate(spans) if span.is_target)
        return "".join(span.text for span in spans[:first])

    def _document(self, place: str, prompt: str, response: str) -> Document:
        document = self._reader.document(place, {"prompt": prompt, "response": response})
        if not document.is_target[0] and any(document.is_target):
            return document
        raise UserError("the prompt has no token in this template")


def _read(
    path: str, data: DataConfig, limit: int | None, example: Callable[[str, Mapping[str, Any]], Example]
) -> tuple[Example, ...]:
    found: list[Example] = []
    for place, fields in _records(path, data):
        if len(found) == limit:
            break
        try:
            found.append(example(place, fields))
        except UserError as error:
            raise UserError(f"{place}: {error}; mend or remove the record") from None
    if not found:
        raise UserError(f"{path} has no examples; write one JSON object per line")
    return tuple(found)


def _records(path: str, data: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    plain = data.model_copy(update={"path": path, "weights": None, "max_documents": None})
    for source in find_sources(plain):
        if source.is_binidx:
            raise UserError(f"{path}: tokens alone have no questions; give a .jsonl file")
        for record in read_records(source, plain):
            if record.fields is None:
                raise UserError(f"{record.place}: {record.problem}; mend or remove the line")
            yield record.place, record.fields


def _prompt(fields: Mapping[str, Any]) -> str:
    prompt = next((fields[key] for key in PROMPT_KEYS if fields.get(key) is not None), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError('needs a non-empty "prompt" (or "question") text')
    return prompt


def _choices(fields: Mapping[str, Any]) -> tuple[list[str], int]:
    value: Any = fields.get("choices")
    labels: Any = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f'"choices" must be a list of at least two texts, got {shown(fields.get("choices"))}')
    labels = labels or list(string.ascii_uppercase[: len(value)])
    answer = fields.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(value):
        return value, answer
    for known in (value, labels):
        if answer in known:
            return value, known.index(answer)
    names = ", ".join(map(str, labels))
    raise UserError(
        f'"answer" must be a number from 0 to {len(value) - 1}, a label ({names}) or the text of a choice, '
        f"got {shown(answer)}"
    )
