"""Faults of the disk that can be foreseen: too little space, folders that cannot be written. Quotas are not seen."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_accel.checkpoint.format import CHECKPOINTS_DIR, list_complete
from rwkv_accel.checkpoint.weights import BEST_DIR, WEIGHTS_DIR
from rwkv_accel.errors import UserError

if TYPE_CHECKING:
    from rwkv_accel.config.schema import RunConfig

# Moments that the optimizer keeps of each trained value.
MOMENTS = {"adamw": 2, "sgd": 0}
MEBIBYTE = 1 << 20


def prove_writable(out_dir: Path) -> None:
    """Raises UserError unless files can be made in the run's folder and in those of its folders that exist."""
    for folder in (out_dir, *(out_dir / name for name in (CHECKPOINTS_DIR, WEIGHTS_DIR, BEST_DIR))):
        try:
            if folder.exists():
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"0")
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written: {error.strerror}; mend it, or choose another out_dir"
            ) from None


def foresee_space(config: RunConfig, model: Any) -> str | None:
    """Compare what the run will write with the free space. None: it will do; a text: it may not.

    model: not yet sharded.

    Raises:
        UserError: not even one checkpoint and one save of the weights have room.
    """
    # With optim.offload a copy in fp32 is written in place of narrow weights.
    width = 4 if config.optim.offload else 0
    trained = sum(p.numel() * max(width, p.element_size()) for p in model.parameters() if p.requires_grad)
    one = trained * (1 + MOMENTS[config.optim.optimizer])
    weights = trained
    out_dir = Path(config.out_dir)
    kept = min(len(list_complete(out_dir / CHECKPOINTS_DIR)), config.checkpoint.keep_last)
    # One more than is kept: the oldest goes only when the newest is complete.
    most = one * (config.checkpoint.keep_last + 1 - kept) + 2 * weights
    free = shutil.disk_usage(out_dir).free
    text = (
        f"{out_dir} has {_size(free)} of free space; a checkpoint of this run takes about {_size(one)}, and its saved "
        f"weights {_size(weights)}"
    )
    if free < one + weights:
        raise UserError(f"{text}: free some, or choose another out_dir")
    if free < most:
        return (
            f"{text}: with checkpoint.keep_last={config.checkpoint.keep_last} it will need {_size(most)}; free some, "
            "or keep fewer"
        )
    return None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / MEBIBYTE:,.1f} MiB"
