"""The section `checkpoint`: what is saved, when, and what a new start continues from."""

from __future__ import annotations

from rwkv_accel.config.base import NonNegative, Positive, Strict


class CheckpointConfig(Strict):
    """What is saved, when, and what a new start continues from."""

    epoch_save: NonNegative = 1
    """Save the adapter (or the full model) every this many epochs. 0 saves it only at the end of the run."""
    every_n_steps: Positive | None = None
    """Write a resume checkpoint every this many updates. None: only at the end of each epoch."""
    keep_last: Positive = 2
    """Resume checkpoints that are kept; older ones are removed."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in out_dir, if any. none: refuse an out_dir that has one.
    Or the path of a checkpoint folder."""
