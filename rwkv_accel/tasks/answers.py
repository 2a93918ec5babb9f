"""Exact match: the model writes a reply, and what it says is compared with the known answer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_accel.checkpoint.collective import all_ranks
from rwkv_accel.config.schema import EvalConfig
from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import Completion, TextGenerator
from rwkv_accel.interrupt import Stopped, StopRequest
from rwkv_accel.tasks.examples import AnswerExample, TaskSet

if TYPE_CHECKING:
    from accelerate import Accelerator

ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
NUMBER = re.compile(r"[$€£]?\s*(-?)[$€£]?((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?)%?")


@dataclass(frozen=True)
class AnswerRecord:
    """One question and what the model made of it."""

    place: str
    reply: str
    given: str | None
    """What was compared; None if the regular expression found nothing in the reply."""
    answers: tuple[str, ...]
    """What would have been right."""
    stopped: bool
    """Whether the reply ended by itself."""

    @property
    def is_right(self) -> bool:
        return self.given in self.answers


@dataclass(frozen=True)
class AnswerResult:
    """Exact match over a set."""

    name: str
    records: tuple[AnswerRecord, ...]

    def values(self) -> dict[str, float]:
        count = len(self.records)
        return {
            "exact_match": sum(r.is_right for r in self.records) / count,
            "no_answer_share": sum(r.given is None for r in self.records) / count,
            "stopped_share": sum(r.stopped for r in self.records) / count,
            "examples": count,
        }

    def describe(self) -> str:
        values = self.values()
        return (
            f"{self.name} exact match {values['exact_match']:.2%} over {values['examples']:,} questions, "
            f"{values['stopped_share']:.0%} of the replies ended by themselves"
        )


def answer_all(
    accelerator: Accelerator,
    generator: TextGenerator,
    task: TaskSet,
    config: EvalConfig,
    stop: StopRequest | None = None,
) -> AnswerResult:
    """Answer every question greedily. Collective; the same result on every rank, for any number of them.

    Batches are the same on any number of processes; each takes every n-th.

    Raises:
        UserError: on every rank, when a prompt does not fit into the memory of one.
        Stopped: on every rank, when one of them wants to stop.
    """
    size, world, rank = config.answers_batch_size, accelerator.num_processes, accelerator.process_index
    found: list[tuple[int, AnswerRecord]] = []
    problem: UserError | None = None
    for start in range(0, len(task.examples), world * size):
        if stop is not None and stop.agreed():
            raise Stopped
        first = start + rank * size
        batch: Sequence[AnswerExample] = () if problem else task.examples[first : first + size]
        try:
            replies = generator.generate(
                [example.prompt for example in batch],
                max_new_tokens=config.answers_max_new_tokens,
                temperature=None,
                stop=config.answers_stop,
            )
            found += [(first + at, _record(*pair, config)) for at, pair in enumerate(zip(batch, replies))]
        except UserError as error:  # the others ask this rank whether to stop, and wait for its share
            problem = error
    if stop is not None and stop.agreed():  # the last replies may have been cut short
        raise Stopped
    shares = all_ranks(accelerator, (found, problem))
    for _, raised in shares:
        if raised is not None:
            raise raised
    merged = sorted((item for items, _ in shares for item in items), key=lambda item: item[0])
    return AnswerResult(task.name, tuple(record for _, record in merged))


def extract(text: str, regex: str | None) -> str | None:
    """The last match of the expression, of it the first group if there is one; None without a match."""
    if regex is None:
        return text
    matches = list(re.finditer(regex, text))
    if not matches:
        return None
    return matches[-1].group(1 if matches[-1].re.groups else 0)


def normalize(text: str, steps: Sequence[str]) -> str:
    """Text as it is compared: white space made one, and what `eval.answers_normalize` names taken out."""
    if "case" in steps:
        text = text.lower()
    text = " ".join(text.split())
    if "numbers" in steps:
        text = " ".join(_plain_number(word) for word in text.split())
    if "articles" in steps:
        text = ARTICLES.sub(" ", text)
    if "punctuation" in steps:
        # The point and the sign of a number are no punctuation.
        kept = "" if "numbers" not in steps else "-."
        drop = str.maketrans("", "", "".join(set(string.punctuation) - set(kept)))
        text = " ".join(word if _is_number(word) else word.translate(drop).strip(kept) for word in text.split())
    return " ".join(text.split())


def _plain_number(word: str) -> str:
    core = word.rstrip(".,;:!?)").lstrip("(")
    match = NUMBER.fullmatch(core)
    if match is None or not match[2].strip(".,"):
        return word
    whole, _, decimals = match[2].replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return match[1] + (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", word) is not None


def _record(example: AnswerExample, reply: Completion, config: EvalConfig) -> AnswerRecord:
    given = extract(reply.text, config.answers_regex)
    right = [found if (found := extract(text, config.answers_regex)) is not None else text for text in example.answers]
    steps = config.answers_normalize
    return AnswerRecord(
        example.place,
        reply.text,
        None if given is None else normalize(given, steps),
        tuple(normalize(text, steps) for text in right),
        reply.stopped_by_itself,
    )
