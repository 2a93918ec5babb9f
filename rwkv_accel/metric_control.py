"""What a validation loss decides: the learning rate's factor, the best checkpoint, and an early end.

The plateau rule is torch.optim.lr_scheduler.ReduceLROnPlateau (mode min, relative threshold) on a factor that
multiplies the schedule. Everything is plain numbers that a checkpoint carries.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from rwkv_accel.config.schema import EvalConfig

# torch's eps: a smaller reduction is not made.
MIN_REDUCTION = 1e-8


@dataclass
class MetricControl:
    """State of the decisions; one `update` per evaluation."""

    lr_factor: float = 1.0
    """Factor on the learning rate of every group."""
    best: float = math.inf
    """Lowest validation loss so far."""
    best_step: int = 0
    """Updates done when it was reached."""
    plateau_best: float = math.inf
    num_bad: int = 0
    cooldown_left: int = 0
    early_best: float = math.inf
    num_without_gain: int = 0

    def update(self, loss: float, step: int, config: EvalConfig) -> None:
        """Take one validation loss (nats per target token) into account. A loss that is not finite is never better."""
        if loss < self.best:
            self.best, self.best_step = loss, step
        if config.plateau_factor is not None:
            self._plateau(loss, config)
        if loss < self.early_best - config.early_stop_min_delta:
            self.early_best, self.num_without_gain = loss, 0
        else:
            self.num_without_gain += 1

    def wants_stop(self, config: EvalConfig) -> bool:
        """Whether the loss has not improved for long enough."""
        return config.early_stop_patience is not None and self.num_without_gain > config.early_stop_patience

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: infinities as None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> MetricControl:
        assert set(saved) == {field.name for field in fields(cls)}, sorted(saved)
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in saved.items()}
        return cls(**values)

    def _plateau(self, loss: float, config: EvalConfig) -> None:
        assert config.plateau_factor is not None
        if loss < self.plateau_best * (1.0 - config.plateau_threshold):
            self.plateau_best, self.num_bad = loss, 0
        else:
            self.num_bad += 1
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.num_bad = 0
        if self.num_bad > config.plateau_patience:
            reduced = max(self.lr_factor * config.plateau_factor, config.plateau_min_factor)
            if self.lr_factor - reduced > MIN_REDUCTION:
                self.lr_factor = reduced
            self.cooldown_left, self.num_bad = config.plateau_cooldown, 0
