"""The task files of a recipe: read once, asked at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwkv_accel.config.schema import EvalConfig, RunConfig
from rwkv_accel.data.sources import set_names
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.runtime import unwrap
from rwkv_accel.tasks.answers import AnswerResult, answer_all
from rwkv_accel.tasks.choices import ChoiceResult, score_choices
from rwkv_accel.tasks.examples import TaskSet, read_answers, read_choices

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Tasks:
    """Sets of examples by kind, in the order of the recipe."""

    choices: tuple[TaskSet, ...] = ()
    answers: tuple[TaskSet, ...] = ()


def read_tasks(config: RunConfig, tokenizer: Tokenizer, vocab_size: int) -> Tasks:
    """The sets of `eval.choices_path` and `eval.answers_path`. Not collective.

    Raises:
        UserError: a record cannot be used, or the model has fewer tokens than the tokenizer.
    """
    settings = config.data, tokenizer, config.eval.limit_examples
    choices, answers = _paths(config.eval.choices_path), _paths(config.eval.answers_path)
    tasks = Tasks(
        tuple(read_choices(name, path, *settings) for name, path in zip(set_names(choices), choices)),
        tuple(read_answers(name, path, *settings) for name, path in zip(set_names(answers), answers)),
    )
    if (tasks.choices or tasks.answers) and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {vocab_size}; use the "
            "tokenizer that the model was made for"
        )
    return tasks


def run_tasks(
    accelerator: Accelerator,
    model: Any,
    tasks: Tasks,
    tokenizer: Tokenizer,
    config: EvalConfig,
    stop: StopRequest | None = None,
) -> list[ChoiceResult | AnswerResult]:
    """Results of every set. Collective; the same on every rank, for any number of them.

    `model` is what training calls; replies need its whole weights on every rank.

    Raises:
        Stopped: on every rank, when one of them wants to stop.
    """
    results: list[ChoiceResult | AnswerResult] = [
        score_choices(accelerator, model, task, stop) for task in tasks.choices
    ]
    if tasks.answers:
        should_stop = None if stop is None else stop.wanted
        generator = TextGenerator(
            unwrap(model), tokenizer, batch_size=config.answers_batch_size, should_stop=should_stop
        )
        results += [answer_all(accelerator, generator, task, config, stop) for task in tasks.answers]
    return results


def _paths(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value
