"""The section `eval`: validation during the run, and what follows from its loss."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rwkv_accel.config.base import CountOrShare, NonNegative, PathTexts, Positive, Strict


class EvalConfig(Strict):
    """Validation during the run, and what follows from its loss."""

    path: PathTexts | None = None
    """Validation files; columns, template and tokenizer are those of the data section. Several files are several sets,
    each with its own numbers; the first one decides."""
    split_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Without a path: share of the training documents that is held out for validation and never trained on."""
    choices_path: PathTexts | None = None
    """Multiple-choice files, each a set of its own: records with prompt (or question), choices and answer. Scored by
    log-likelihood; the prompt goes through data.template."""
    answers_path: PathTexts | None = None
    """Files of questions with one right answer, each a set of its own: records with prompt (or question) and answer.
    The model writes a reply greedily; it counts if it is the answer exactly."""
    answers_regex: str | None = None
    """What of a reply is its answer: the last match, and of it the first group if there is one (for GSM8K
    `#### (-?[0-9.,]+)`). Applied to the file's answers too, where it matches. None: the whole text."""
    answers_normalize: tuple[Literal["case", "punctuation", "articles", "numbers"], ...] = ()
    """What does not count when a reply is compared, beside white space: case, punctuation, English articles, and the
    writing of numbers ($1,234.0 is 1234)."""
    answers_max_new_tokens: Positive = 256
    """Length limit of a reply in tokens."""
    answers_stop: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that end a reply, beside end of text. None: the next turn if the prompt is in the chat form, else none."""
    answers_batch_size: Positive = 64
    """Replies that a process writes at once."""
    limit_examples: Positive | None = None
    """Use only the first this many documents of each file of path, choices_path and answers_path."""
    every_n_steps: CountOrShare | None = None
    """Evaluate every this many updates, or (0.25) every such share of an epoch's updates."""
    every_n_epochs: Positive | None = 1
    """Evaluate at the end of every this many epochs. None: never at an epoch's end."""
    at_start: bool = False
    """Evaluate before the first update."""
    limit_batches: CountOrShare | None = None
    """Use only this many batches of each set (micro_batch_size rows per process each), or this share of them."""
    keep_best: bool = True
    """Save the weights to out_dir/best whenever the validation loss is the lowest so far."""
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Multiply the learning rate by this when the validation loss stops falling (on top of the schedule). None: off."""
    plateau_patience: NonNegative = 3
    """Evaluations without improvement that are tolerated before the rate is multiplied."""
    plateau_threshold: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    """Relative fall of the loss that counts as an improvement."""
    plateau_cooldown: NonNegative = 0
    """Evaluations after a reduction in which nothing is counted."""
    plateau_min_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Lower bound of the product of all reductions."""
    early_stop_patience: NonNegative | None = None
    """End the run after more than this many evaluations without improvement. None: never."""
    early_stop_min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Fall of the loss (nats per token) that counts as an improvement for early_stop_patience."""

    @property
    def has_loss(self) -> bool:
        """Whether there is a validation loss, which the controls go by."""
        return self.path is not None or self.split_fraction > 0

    @property
    def is_on(self) -> bool:
        """Whether there is anything to validate on."""
        return self.has_loss or self.choices_path is not None or self.answers_path is not None

    @field_validator("answers_regex")
    @classmethod
    def _is_regex(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error}); mend it") from None
        return value

    @model_validator(mode="after")
    def _has_data(self) -> EvalConfig:
        if self.path is not None and self.split_fraction:
            raise ValueError("set one of eval.path and eval.split_fraction, not both")
        controls = self.plateau_factor is not None or self.early_stop_patience is not None
        if not self.has_loss and controls:
            raise ValueError("eval has no data for a loss: set eval.path, or eval.split_fraction (0.02, say)")
        if not self.is_on and (self.at_start or self.every_n_steps is not None):
            raise ValueError("the eval section has no data: set eval.path, or eval.split_fraction (0.02, say)")
        return self
