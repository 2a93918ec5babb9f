"""The section `checkpoint`: what is saved, when, and what a new start continues from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rwkv_accel.config.base import NonNegative, Positive, Strict


class CheckpointConfig(Strict):
    """What is saved, when, and what a new start continues from."""

    epoch_save: NonNegative = 1
    """Save the adapter (or the full model) every this many epochs. 0 saves it only at the end of the run."""
    keep_weights: Positive | None = None
    """Saves of the adapter (or the full model) that are kept, beside best/; older ones are removed. None: all."""
    every_n_steps: Positive | None = None
    """Write a resume checkpoint every this many updates. None: no count of updates asks for one. The end of each
    epoch and a signal always do."""
    every_n_minutes: Annotated[float, Field(gt=0)] | None = None
    """Write a resume checkpoint when the last one is this many minutes old. None: time does not matter."""
    keep_last: Positive = 2
    """Resume checkpoints that are kept; older ones are removed."""
    keep_every_n_steps: Positive | None = None
    """Write a resume checkpoint at each multiple of this many updates, and never remove it. None: all grow old."""
    background: bool = True
    """Write checkpoints while the training goes on: only the copy to the host's memory holds it up. The copy (trained
    parameters and moments) stays in the memory of the main process until it is on disk."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in out_dir, if any. none: refuse an out_dir that has one.
    Or the path of a checkpoint folder."""
