"""The section `trainer`: length of the run, batch, precision and the engine's switches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rwkv_accel.config.base import NonNegative, Positive, Strict
from rwkv_accel.errors import UserError


class TrainerConfig(Strict):
    """Length of the run, batch, precision and the engine's switches."""

    max_epochs: Positive = 1
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer updates, even within an epoch. None: after max_epochs."""
    micro_batch_size: Positive = 1
    """Rows per process and forward pass."""
    global_batch_size: Positive | None = None
    """Rows per optimizer update over all processes. The number of micro-batches follows from it."""
    accumulate_grad_batches: Positive | None = None
    """Micro-batches per process and update; the other way to say global_batch_size. Default 1."""
    gradient_clip_val: Annotated[float, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """32-true: all fp32. bf16-mixed: frozen weights and arithmetic in bf16, trained weights and moments fp32.
    bf16-true: all weights bf16."""
    gradient_checkpointing: Literal["none", "block"] = "none"
    """block: keep only the input of each block and recompute the rest in the backward pass."""
    l2wrap: Annotated[float, Field(ge=0)] = 1e-4
    """Strength of the pull of the largest logit towards 0 (gradient only). 0 switches it off."""
    loss_chunk_rows: Positive = 512
    """Rows of logits that are in memory at a time while the loss is computed."""
    seed: NonNegative = 42
    """Seed of data order, adapter init and dropout."""
    log_every_n_steps: Positive = 1
    """Steps between log records; steps in between never wait for the device."""

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainerConfig:
        if self.global_batch_size is not None and self.accumulate_grad_batches is not None:
            raise ValueError("set one of trainer.global_batch_size and trainer.accumulate_grad_batches, not both")
        return self

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per process in one full optimizer update.

        Raises:
            UserError: global_batch_size is not a multiple of micro_batch_size * world_size.
        """
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size is None:
            return self.accumulate_grad_batches or 1
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass * per_pass
            fits = f"{below} or {below + per_pass}" if below else f"{per_pass}"
            raise UserError(
                f"trainer.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} processes; use {fits}, or another micro_batch_size"
            )
        return self.global_batch_size // per_pass
