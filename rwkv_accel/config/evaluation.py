"""The section `eval`: validation during the run, and what follows from its loss."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rwkv_accel.config.base import CountOrShare, NonNegative, Positive, Strict


class EvalConfig(Strict):
    """Validation during the run, and what follows from its loss."""

    path: str | tuple[str, ...] | None = None
    """Validation files; columns, template and tokenizer are those of the data section. Several files are several sets,
    each with its own numbers; the first one decides."""
    split_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Without a path: share of the training documents that is held out for validation and never trained on."""
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
    def is_on(self) -> bool:
        """Whether there is anything to validate on."""
        return self.path is not None or self.split_fraction > 0

    @model_validator(mode="after")
    def _has_data(self) -> EvalConfig:
        if self.path is not None and self.split_fraction:
            raise ValueError("set one of eval.path and eval.split_fraction, not both")
        controls = self.plateau_factor is not None or self.early_stop_patience is not None or self.at_start
        if not self.is_on and (controls or self.every_n_steps is not None):
            raise ValueError("the eval section has no data: set eval.path, or eval.split_fraction (0.02, say)")
        return self
