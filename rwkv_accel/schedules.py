"""Learning rate and weight decay as pure functions of the step. No scheduler object, nothing to checkpoint.

`step` counts completed optimizer updates: the first update of a run has step 0. Progress follows RWKV-LM
(train_temp/src/trainer.py): it starts after the warmup and reaches 1 at `total_steps`.
"""

from __future__ import annotations

import math

from rwkv_accel.config.schema import OptimConfig


def progress_at(step: float, total_steps: float, warmup_steps: int) -> float:
    """Share of the post-warmup run that lies before this step, clamped to [0, 1]."""
    if total_steps <= warmup_steps:
        return 0.0
    return min(max((step - warmup_steps) / (total_steps - warmup_steps), 0.0), 1.0)


def lr_at(step: float, total_steps: float, optim: OptimConfig) -> float:
    """Learning rate of the update with this step, before the groups' lr_scale."""
    init = optim.lr_init
    final = init if optim.lr_final is None else optim.lr_final
    progress = progress_at(step, total_steps, optim.warmup_steps)
    if optim.schedule == "constant":
        lr = init
    elif optim.schedule == "linear":
        lr = init + (final - init) * progress
    elif optim.schedule == "cosine":
        lr = final + (init - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif optim.schedule == "exponential":
        lr = init * math.exp(progress * math.log(final / init))
    else:  # wsd
        decayed = max(progress - (1.0 - optim.wsd_decay_share), 0.0) / optim.wsd_decay_share
        lr = init + (final - init) * decayed
    if step < optim.warmup_steps:
        lr *= 0.01 + 0.99 * step / optim.warmup_steps
    return lr


def wd_at(step: float, total_steps: float, optim: OptimConfig) -> float:
    """Weight decay of the update with this step, before the groups' wd_scale (RWKV-v5/src/trainer.py)."""
    if optim.weight_decay_final is None:
        return optim.weight_decay
    progress = progress_at(step, total_steps, optim.warmup_steps)
    return optim.weight_decay * math.exp(progress * math.log(optim.weight_decay_final / optim.weight_decay))
