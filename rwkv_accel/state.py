"""TrainState: the only mutable numbers of a run, besides parameters, optimizer moments and RNG."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from rwkv_accel.guard import Health
from rwkv_accel.metric_control import MetricControl

NESTED: dict[str, Any] = {"control": MetricControl, "health": Health}


@dataclass
class TrainState:
    """Where a run stands. Schedules and the sampler are pure functions of it."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Optimizer updates that are behind the run, those that were skipped included."""
    rows_consumed: int = 0
    """Rows of the current epoch that have been trained on, over all processes."""
    tokens_seen: int = 0
    """Tokens processed so far, padding excluded, over all processes."""
    targets_seen: int = 0
    """Tokens that were targets of the loss so far, over all processes."""
    evaluated_step: int = -1
    """Update after which the last validation at its cadence was finished."""
    sampled_step: int = -1
    """Update after which the recipe's prompts were last answered."""
    control: MetricControl = field(default_factory=MetricControl)
    """What the validation losses have decided so far."""
    health: Health = field(default_factory=Health)
    """Updates that were skipped, and what the next decision of that kind depends on."""

    def advance(self, num_rows: int) -> None:
        """Count one optimizer update. Runs before any save, so that a checkpoint never repeats or skips a window."""
        self.step += 1
        self.rows_consumed += num_rows

    def end_epoch(self) -> None:
        self.epoch += 1
        self.rows_consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**values, **{name: getattr(self, name).state_dict() for name in NESTED}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        names = {entry.name for entry in fields(self)}
        assert set(saved) == names, f"train state holds {sorted(saved)}, expected {sorted(names)}"
        for name, value in saved.items():
            setattr(self, name, NESTED[name].from_state_dict(value) if name in NESTED else value)
