"""Which updates are made: none from a loss or a gradient that is not finite, and none from a spike of the loss.

A skipped update leaves parameters, moments and the optimizer's own count of updates alone. It still counts as a step:
its rows are consumed, and schedules and cadences go on, so that the run ends where the recipe says.

Everything is decided on the device, from numbers that all ranks share, and read with the other scalars of a log step.
A batch that must not be learned from is known before the last backward of its window; that backward is multiplied by
NaN, so that one test of the gradient's norm covers every reason under every strategy. DeepSpeed makes its update
within that backward, and its ZeRO optimizers leave out an update whose norm is not finite by themselves.

The scale of the loss under 16-mixed lives here too: an overflow is one more reason to skip. It follows the rule of
torch.amp.GradScaler, with a floor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwkv_accel.config.schema import TrainerConfig

# Verdicts on an update.
APPLIED, NONFINITE, SPIKE, OVERFLOW = 0, 1, 2, 3
REASONS = {NONFINITE: "not finite", SPIKE: "a spike of the loss", OVERFLOW: "an overflow of fp16"}

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
GROWTH_INTERVAL = 2000
# The running mean of the loss remembers about 50 updates, and judges once it has seen 20.
MEAN_DECAY = 0.98
MIN_LOSSES = 20


@dataclass
class Health:
    """Counts of skipped updates, and the numbers that the next decision depends on. Part of TrainState."""

    nonfinite_steps: int = 0
    """Updates skipped because the loss or the gradient was not finite."""
    nonfinite_in_row: int = 0
    """How many of them came last, without an update in between."""
    spike_steps: int = 0
    """Updates skipped by trainer.spike_guard_factor."""
    overflow_steps: int = 0
    """Updates skipped because the scaled gradient of fp16 overflowed, which lowers the scale."""
    mean_loss: float = 0.0
    """Running mean of the loss per target token, for trainer.spike_guard_factor."""
    num_losses: int = 0
    """Losses in it."""
    loss_scale: float = INITIAL_SCALE
    """Factor on the loss under 16-mixed."""
    good_steps: int = 0
    """Updates since the scale was last changed."""

    def count(self, verdict: int) -> None:
        """Take one verdict into account. An overflow says nothing about the batch: it neither adds to a row of
        non-finite updates nor ends one."""
        if verdict in (APPLIED, SPIKE):
            self.nonfinite_in_row = 0
        if verdict == NONFINITE:
            self.nonfinite_in_row += 1
            self.nonfinite_steps += 1
        self.spike_steps += verdict == SPIKE
        self.overflow_steps += verdict == OVERFLOW

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Health:
        assert set(saved) == {entry.name for entry in fields(cls)}, sorted(saved)
        return cls(**saved)


class UpdateGuard:
    """Decides on each update. Its numbers stay on the device; `read` brings them back."""

    def __init__(self, trainer: TrainerConfig, health: Health, device: torch.device) -> None:
        self.scales_loss = trainer.precision == "16-mixed"
        self._factor = trainer.spike_guard_factor
        scale = health.loss_scale if self.scales_loss else 1.0
        numbers = [health.mean_loss, health.num_losses, scale, health.good_steps]
        self._mean, self._num, self.loss_scale, self._good = torch.tensor(
            numbers, dtype=torch.float64, device=device
        ).unbind()
        self.verdict = self._reason = torch.zeros((), dtype=torch.float64, device=device)
        """What became of the last update, as a device scalar."""

    def weigh(self, loss: Tensor) -> Tensor:
        """Factor on the last backward of a window: 1, or NaN if the window's loss forbids the update.

        loss: mean per target token over all ranks, the same on each.
        """
        self._loss = loss
        self._reason = torch.where(loss.isfinite(), APPLIED, NONFINITE).double()
        if self._factor is not None:
            spikes = (self._num >= MIN_LOSSES) & (loss > self._factor * self._mean)
            self._reason = torch.where(spikes & loss.isfinite(), float(SPIKE), self._reason)
        return torch.where(self._reason == APPLIED, 1.0, torch.nan)

    def unscale(self, params: list[Tensor]) -> None:
        """Take the loss scale out of the gradients, before they are clipped."""
        grads = [param.grad for param in params if param.grad is not None]
        if self.scales_loss and grads:
            torch._foreach_mul_(grads, self.loss_scale.reciprocal().float())

    def step(self, optimizer: Optimizer, grad_norm: Tensor) -> None:
        """Make the update unless the norm of the gradient is not finite. Waits for the device only if it must."""
        is_finite = grad_norm.isfinite()
        inner = getattr(optimizer, "optimizer", optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False):
            # A fused optimizer looks at this flag on the device, as under torch.amp.GradScaler.
            inner.grad_scale, inner.found_inf = None, (~is_finite).float()
            optimizer.step()
            del inner.grad_scale, inner.found_inf
        elif is_finite:
            optimizer.step()
        self.judge(is_finite)

    def judge(self, is_made: Tensor) -> None:
        """Settle the verdict on the update that was or was not made; adapt the running mean and the scale."""
        # Without scaling the scale is 1, the floor: no smaller scale would have helped.
        lost = torch.where(self.loss_scale <= MIN_SCALE, NONFINITE, OVERFLOW)
        verdict = torch.where(self._reason != APPLIED, self._reason, torch.where(is_made, APPLIED, lost).double())
        if self._factor is not None:
            # A loss beyond the limit counts as the limit: a lasting rise is accepted after a while.
            seen = torch.minimum(self._loss, torch.where(self._num > 0, self._factor * self._mean, self._loss))
            mean = torch.where(self._num > 0, seen + MEAN_DECAY * (self._mean - seen), seen)
            counts = (verdict == APPLIED) | (verdict == SPIKE)
            self._mean, self._num = torch.where(counts, mean, self._mean), self._num + counts
        if self.scales_loss:
            self._adapt_scale(verdict)
        self.verdict = verdict

    def read(self, health: Health) -> None:
        """Bring the numbers back from the device."""
        numbers = torch.stack([self._mean, self._num, self.loss_scale, self._good]).tolist()
        health.mean_loss, health.num_losses = numbers[0], int(numbers[1])
        if self.scales_loss:
            health.loss_scale, health.good_steps = numbers[2], int(numbers[3])

    def _adapt_scale(self, verdict: Tensor) -> None:
        good = torch.where(verdict == APPLIED, self._good + 1, self._good)
        grows, shrinks = good >= GROWTH_INTERVAL, verdict == OVERFLOW
        scale = torch.where(grows, self.loss_scale * 2, self.loss_scale)
        self.loss_scale = torch.where(shrinks, (self.loss_scale / 2).clamp_min(MIN_SCALE), scale)
        self._good = torch.where(grows | shrinks, 0.0, good)
