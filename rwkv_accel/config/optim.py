"""The section `optim`: optimizer, learning rate and weight decay."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rwkv_accel.config.base import NonNegative, Strict


class LrScale(Strict):
    """Factors on the learning rate, by parameter group."""

    w0: Annotated[float, Field(ge=0)] = 2.0
    """Decay bias `att.w0` (twice the rate in the official trainer)."""
    emb: Annotated[float, Field(ge=0)] = 1.0
    """Embedding."""
    head: Annotated[float, Field(ge=0)] = 1.0
    """Output head."""
    lora_A: Annotated[float, Field(ge=0)] = 1.0
    """Adapter matrices A."""
    lora_B: Annotated[float, Field(ge=0)] = 1.0
    """Adapter matrices B (LoRA+ uses about 16, arXiv 2402.12354)."""
    state: Annotated[float, Field(ge=0)] = 1.0
    """Initial WKV states. Alone they want a rate of 1 falling to 0.01; beside an adapter, a scale of 100 and more."""


class OptimConfig(Strict):
    """Optimizer, learning rate and weight decay. The schedule is evaluated at every step from the step alone."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay. sgd: plain, without momentum (for comparisons)."""
    offload: bool = False
    """adamw: keep the moments in the host's memory, with an fp32 copy of trained weights that are narrower (precision
    bf16-true); an update streams them through the GPU. The same result in 8 bytes less per trained value of a GPU's
    memory. On one process and under ddp; zero2_offload and zero3_offload do it under DeepSpeed."""
    lr_init: Annotated[float, Field(ge=0)] = 2e-5
    """Learning rate after the warmup."""
    lr_final: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the last step. None means lr_init."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "exponential"] = "cosine"
    """Path from lr_init to lr_final. wsd: stable at lr_init, then linear decay over the last wsd_decay_share."""
    wsd_decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the steps spent decaying."""
    warmup_steps: NonNegative = 0
    """Steps over which the rate rises from 1% to 100% (factor 0.01 + 0.99 * step / warmup_steps)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon. Official pretraining uses 1e-18 (needs fp32 moments)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay on the large `.weight` matrices of the base only."""
    weight_decay_final: Annotated[float, Field(ge=0)] | None = None
    """Weight decay at the last step, reached exponentially. None keeps weight_decay."""
    lr_scale: LrScale = LrScale()
    """Factors per parameter group."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        if self.offload and self.optimizer != "adamw":
            raise ValueError(
                f"optim.offload moves AdamW's moments, optim.optimizer {self.optimizer} has none; remove it"
            )
        final = self.lr_init if self.lr_final is None else self.lr_final
        if self.schedule == "exponential" and (self.lr_init == 0 or final == 0):
            raise ValueError("optim.schedule exponential needs lr_init and lr_final above 0; use linear or cosine")
        if self.schedule == "constant" and final != self.lr_init:
            raise ValueError(
                f"optim.schedule constant never reaches lr_final {final:g}; drop lr_final or choose linear, cosine, "
                "wsd or exponential"
            )
        if self.weight_decay_final is not None and (self.weight_decay == 0 or self.weight_decay_final == 0):
            raise ValueError("optim.weight_decay_final is reached exponentially: both values must be above 0")
        return self
