"""The sections `model` and `model.init`: which weights to start from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rwkv_accel.config.base import NonNegative, PathText, Positive, Strict


class InitConfig(Strict):
    """Shape of a model that is started from the official random initialisation."""

    n_layer: Positive
    """Number of blocks."""
    n_embd: Annotated[int, Field(ge=32)]
    """Channels C; a multiple of head_size."""
    vocab_size: Positive | None = None
    """Rows of the embedding. None takes the tokenizer's size (65536 for world, 257 for byte)."""
    head_size: Literal[16, 32, 64, 128] = 64
    """Channels per head N. Released models use 64."""
    seed: NonNegative = 0
    """Seed of the random matrices."""

    @model_validator(mode="after")
    def _heads_divide(self) -> InitConfig:
        if self.n_embd % self.head_size:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of head_size {self.head_size}; "
                f"use {self.n_embd // self.head_size * self.head_size or self.head_size}"
            )
        return self


class ModelConfig(Strict):
    """Which weights to start from, and how the model computes."""

    path: PathText | None = None
    """Base checkpoint, .pth or .safetensors in the official parameter names. All sizes are read from its shapes."""
    init: InitConfig | None = None
    """Start from random weights of this shape instead of a checkpoint."""
    wkv_backend: Literal["auto", "reference", "chunked", "native", "triton"] = "auto"
    """Implementation of the WKV-7 recurrence. `auto` takes the fastest that runs on the device."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("set exactly one of model.path (a checkpoint) and model.init (random weights)")
        return self
