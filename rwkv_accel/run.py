"""A run in progress: what the loop and its hooks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from rwkv_accel.checkpoint import CheckpointWriter, SaveCadence
from rwkv_accel.checkpoint.run_lock import RunLock
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.data.loader import TrainLoader
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.evaluation import Evaluator
from rwkv_accel.guard import UpdateGuard
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.limits import RunLimits
from rwkv_accel.profiling import StepProfiler
from rwkv_accel.tracking import RunLog
from rwkv_accel.watchdog import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepStats:
    """Reduced results of one update as device scalars; reading one waits for the device."""

    loss: Tensor
    grad_norm: Tensor
    num_targets: Tensor
    num_tokens: Tensor
    verdict: Tensor
    """One of guard.py's."""
    batch_losses: list[Tensor]
    """Loss sum of each micro-batch of this process."""
    batch_rows: list[tuple[int, ...]]
    """Rows of each micro-batch of this process."""


@dataclass
class Run:
    """What the hooks share: the run's config, its logs, and the numbers not yet read from the device."""

    config: RunConfig
    accelerator: Accelerator
    model: Any
    optimizer: Optimizer
    log: RunLog
    guard: UpdateGuard
    stop: StopRequest
    writer: CheckpointWriter
    cadence: SaveCadence
    limits: RunLimits
    total_steps: int
    eval_every: int | None
    """Updates between evaluations; None: only at the ends of epochs."""
    profiler: StepProfiler
    base_path: str
    base_digest: str
    evaluator: Evaluator
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """The resolved recipe with the rows per update filled in: what a resume is compared with."""
    loader: TrainLoader
    lock: RunLock
    """Keeps other runs out of the folder."""
    watchdog: Watchdog
    pending: list[tuple[StepStats, float, float]] = field(default_factory=list)
    """Stats, learning rate and weight decay of the updates whose scalars are still on the device."""
    unlogged: list[list[float]] = field(default_factory=list)
    """[loss, grad norm, targets, tokens, verdict, lr, wd] of each update since the last record, already read from the
    device."""
    saved_step: int = -1
    checkpoint_step: int = -1
    started: bool = False

    def close(self) -> None:
        """Let go of the run's folder. Nothing is written after it."""
        self.log.close()
        self.lock.release()
        self.watchdog.stop()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no single process holds whole parameters (ZeRO-3, FSDP2)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3)
