"""The section `trainer`: length of the run, batch, precision and the engine's switches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rwkv_accel.config.base import CountOrShare, NonNegative, Positive, Strict
from rwkv_accel.errors import UserError

_UNIT_SECONDS = (1, 60, 3600, 86400)


class TrainerConfig(Strict):
    """Length of the run, batch, precision and the engine's switches."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute. auto: GPUs where there are any. gpu: refuse to run without one. cpu: leave GPUs alone."""
    strategy: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"] = (
        "auto"
    )
    """Sharding that the launcher must have set up, by the name of the file in accelerate_configs/. auto: whatever it
    has."""
    devices: Positive | None = None
    """Processes per node that the launcher must have started. None: whatever it has."""
    num_nodes: Positive | None = None
    """Nodes that the launcher must have started. None: whatever it has."""
    max_epochs: Positive = 1
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer updates, even within an epoch. None: after max_epochs."""
    min_steps: NonNegative = 0
    """Optimizer updates before which neither early stopping nor max_time ends the run."""
    max_tokens: Positive | None = None
    """Stop after the update that completes this many tokens, padding excluded. The schedule ends there too."""
    max_time: Annotated[float, Field(gt=0)] | None = None
    """Seconds, or "DD:HH:MM:SS", from this start of the run: then it saves and ends in order. The same command
    continues it, with as much time again."""
    limit_train_batches: CountOrShare | None = None
    """Train on only this many updates' rows of each epoch: a number, or a share of the epoch (0.1)."""
    overfit_batches: CountOrShare | None = None
    """Train on the same first rows in every epoch, unshuffled: this many updates' worth, or a share of the data."""
    fast_dev_run: NonNegative = 0
    """Rehearse this many updates (true is 1) with evaluation, answers and saves, and remove all that was written.
    0 or false: a real run."""
    micro_batch_size: Positive = 1
    """Rows per process and forward pass."""
    global_batch_size: Positive | None = None
    """Rows per optimizer update over all processes. The number of micro-batches follows from it."""
    accumulate_grad_batches: Positive | None = None
    """Micro-batches per process and update; the other way to say global_batch_size. Default 1."""
    gradient_clip_val: Annotated[float, Field(ge=0)] = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    """32-true: all fp32. bf16-mixed: frozen weights and arithmetic in bf16, trained weights and moments fp32.
    16-mixed: the same in fp16, with a loss scale that adapts, for GPUs without bf16. bf16-true: all weights bf16."""
    gradient_checkpointing: Literal["none", "block", "offload", "selective"] = "none"
    """block: keep only the input of each block and recompute the rest in the backward pass. offload: the same, with the
    inputs in the host's memory until they are needed (on a CPU that is block). selective: recompute what lies between
    the large matrix products of the time mix (recurrence included) and keep the products."""
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    """Compile each block with torch.compile, as one graph. inductor (or true): fused kernels; needs a C++ compiler, on
    a GPU Triton. aot_eager: traced but not fused, to look for the cause of a difference."""
    deterministic: Literal[False, True, "warn"] = False
    """true: the same bits in every run on the same hardware, or an error that names the operation that cannot. warn:
    only say so."""
    benchmark: bool = False
    """Let cuDNN time its algorithms and keep the fastest."""
    detect_anomaly: bool = False
    """Stop at the first NaN of a backward pass with the forward operation that made it. Slow."""
    profiler: Literal["pytorch"] | None = None
    """pytorch: a trace of a few updates of the main process in out_dir/profile, for chrome://tracing or Perfetto."""
    max_nonfinite_steps: Positive | None = 10
    """End the run after this many updates in a row whose loss or gradient is not finite (each of them is skipped).
    None: never. Noticed at the next log record."""
    spike_guard_factor: Annotated[float, Field(gt=1)] | None = None
    """Skip an update whose loss is above this multiple of the running mean loss (of about 50 updates). None: off."""
    stall_timeout_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Report where every rank stands, with its stacks, after this long without progress of any rank. None: never."""
    stall_action: Literal["report", "exit"] = "report"
    """exit: after the report, end the process with exit code 70, so that a launcher can start the run again."""
    l2wrap: Annotated[float, Field(ge=0)] = 1e-4
    """Strength of the pull of the largest logit towards 0 (gradient only). 0 switches it off."""
    loss_chunk_rows: Positive = 512
    """Rows of logits that are in memory at a time while the loss is computed."""
    seed: NonNegative = 42
    """Seed of data order, adapter init and dropout."""
    log_every_n_steps: Positive = 1
    """Steps between log records; steps in between never wait for the device."""

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_name(cls, value: Any) -> Any:
        return {True: "inductor", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("max_time", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if not isinstance(value, str) or ":" not in value:
            return value
        parts = value.split(":")
        if len(parts) > len(_UNIT_SECONDS) or not all(part.isdecimal() for part in parts):
            raise ValueError(f"write seconds or DD:HH:MM:SS (00:11:30:00 is eleven and a half hours), not {value!r}")
        return sum(int(part) * unit for part, unit in zip(reversed(parts), _UNIT_SECONDS))

    @model_validator(mode="after")
    def _switches_fit(self) -> TrainerConfig:
        if self.max_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(
                f"set trainer.min_steps to at most trainer.max_steps: {self.min_steps} is above {self.max_steps}"
            )
        if self.limit_train_batches is not None and self.overfit_batches is not None:
            raise ValueError("set one of trainer.limit_train_batches and trainer.overfit_batches, not both")
        if self.deterministic and self.benchmark:
            raise ValueError("set one of trainer.deterministic and trainer.benchmark: timing picks other algorithms")
        return self

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
