"""One logged step: what the loop hands in, and the record that loss_data.json and the trackers get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

# Fields of a record that depend on the clock and the machine. All others of a killed and resumed run equal those of
# an undisturbed one.
TIME_FIELDS = ("kt_s", "target_kt_s", "it_s", "wait_share", "memory_bytes", "wall_seconds", "mfu")


@dataclass(frozen=True)
class StepRecord:
    """The numbers of the optimizer updates since the record before (one update, or as many as a log step spans)."""

    step: int
    """Completed optimizer updates."""
    epoch: int
    """Completed epochs: 0 while the first is running."""
    loss: float
    """Mean loss per target token over the updates of this record, over all processes; losses that are not finite are
    left out."""
    lr: float
    """Learning rate of the last update."""
    weight_decay: float
    """Weight decay of the last update."""
    grad_norm: float
    """Global L2 norm of the last update's gradient, before clipping."""
    target_tokens: int
    """Tokens that were targets of the loss, over all processes and the updates of this record."""
    tokens: int
    """Tokens processed, padding excluded, over all processes and the updates of this record."""
    num_steps: int = 1
    """Updates that this record stands for."""
    skipped_steps: int = 0
    """How many of them were not made (not finite, a spike, an overflow of fp16)."""
    nonfinite_steps: int = 0
    """Updates of the whole run that were not made because the loss or the gradient was not finite."""
    loss_scale: float | None = None
    """Factor on the loss under 16-mixed; None elsewhere."""


class EvalRecord(Protocol):
    """Results over one set of validation data, whatever was measured."""

    @property
    def name(self) -> str: ...

    def values(self) -> dict[str, float]:
        """Numbers for files and trackers."""
        ...

    def describe(self) -> str:
        """One line for people, with the name."""
        ...


def json_ready(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities as None: JSON has no literal for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
