"""What a skipped update leaves for a look: its rows and documents in a file, and what to do about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rwkv_accel.config.schema import RunConfig
from rwkv_accel.data.loader import TrainLoader
from rwkv_accel.guard import NONFINITE, REASONS, SPIKE

FOLDERS = {NONFINITE: "nonfinite", SPIKE: "spikes"}
# Of a run that skips update after update the first tell enough.
MAX_FILES = 200


def leave_batch(
    config: RunConfig,
    *,
    step: int,
    verdict: int,
    loss: float,
    grad_norm: float,
    batches: list[list[tuple[float, tuple[int, ...]]]],
    loader: TrainLoader,
) -> str:
    """Write out_dir/nonfinite/step-00000012.json (or spikes/...) and return the message about it.

    batches: (loss sum, rows) of each micro-batch of each rank. Micro-batches whose own loss is not finite come first.
    """
    listed = [
        {
            "rank": rank,
            "micro_batch": number,
            "loss_sum": _plain(loss_sum),
            "rows": list(rows),
            "documents": sorted({document for row in rows for document in loader.documents(row)}),
        }
        for rank, of_rank in enumerate(batches)
        for number, (loss_sum, rows) in enumerate(of_rank)
        if rows
    ]
    listed.sort(key=lambda batch: batch["loss_sum"] is not None)
    path = Path(config.out_dir) / FOLDERS[verdict] / f"step-{step:08d}.json"
    content = {"step": step, "reason": REASONS[verdict], "loss": _plain(loss), "grad_norm": _plain(grad_norm)}
    what = f"loss {loss:.4g}" if math.isfinite(loss) else "loss not finite"
    message = f"step {step}: update skipped, {REASONS[verdict]} ({what}, gradient norm {grad_norm:.4g})"
    try:
        path.parent.mkdir(exist_ok=True)
        if len(list(path.parent.iterdir())) < MAX_FILES:
            path.write_text(json.dumps({**content, "batches": listed}, indent=1) + "\n", encoding="utf-8")
            return f"{message}; its rows are in {path}"
    except OSError as error:
        return f"{message}; its rows could not be written: {error.strerror}"
    return message


def nonfinite_help(config: RunConfig, step: int, in_row: int) -> str:
    """Why the run ends, and what may help."""
    folder = Path(config.out_dir) / FOLDERS[NONFINITE]
    remedies = ["lower optim.lr_init"]
    if config.trainer.precision == "bf16-true":
        remedies.append("trainer.precision=bf16-mixed")
    if config.trainer.precision == "16-mixed":
        remedies.append("trainer.precision=bf16-mixed, whose range is wider")
    if config.trainer.gradient_clip_val == 0:
        remedies.append("trainer.gradient_clip_val=1.0")
    return (
        f"the loss or the gradient was not finite in {in_row} updates in a row, up to step {step}; none of them was "
        f"made, and the newest checkpoint is sound. The rows are in {folder}, look at them with `python -m "
        f"rwkv_accel.data preview {config.out_dir}/run.yaml --batch {folder}/step-{step:08d}.json`; then repair the "
        f"data, or {', or '.join(remedies)}"
    )


def _plain(value: float) -> Any:
    return value if math.isfinite(value) else None
