"""The numbers of the updates: from device scalars to records in the logs, in one wait for all that are pending."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv_accel.checkpoint.collective import all_ranks
from rwkv_accel.errors import UserError
from rwkv_accel.guard import APPLIED, NONFINITE, OVERFLOW
from rwkv_accel.run import Run, StepStats
from rwkv_accel.skipped import leave_batch, nonfinite_help
from rwkv_accel.state import TrainState
from rwkv_accel.tracking import StepRecord


def read_pending(state: TrainState, run: Run) -> None:
    """Read the pending device scalars in one wait and count their tokens."""
    if not run.pending:
        return
    rows = torch.stack([_row(stats) for stats, _, _ in run.pending]).tolist()
    pending, run.pending = run.pending, []
    run.unlogged += [[*row, lr, wd] for row, (_, lr, wd) in zip(rows, pending)]
    state.targets_seen += int(sum(row[2] for row in rows))
    state.tokens_seen += int(sum(row[3] for row in rows))
    run.guard.read(state.health)
    for step, row, (stats, _, _) in zip(range(state.step - len(rows) + 1, state.step + 1), rows, pending):
        verdict = int(row[4])
        state.health.count(verdict)
        if verdict != APPLIED:
            on_skipped(state, run, step, stats, verdict)


def log_pending(state: TrainState, run: Run) -> None:
    """Write one record for all updates since the last one."""
    read_pending(state, run)
    if not run.unlogged:
        return
    rows, run.unlogged = run.unlogged, []
    finite = [row for row in rows if math.isfinite(row[0])]
    targets = sum(row[2] for row in finite)
    run.log.log_step(
        StepRecord(
            step=state.step,
            epoch=state.epoch,
            loss=sum(row[0] * row[2] for row in finite) / max(targets, 1) if finite else math.nan,
            lr=rows[-1][5],
            weight_decay=rows[-1][6],
            grad_norm=rows[-1][1],
            target_tokens=int(sum(row[2] for row in rows)),
            tokens=int(sum(row[3] for row in rows)),
            num_steps=len(rows),
            skipped_steps=sum(row[4] != APPLIED for row in rows),
            nonfinite_steps=state.health.nonfinite_steps,
            loss_scale=state.health.loss_scale if run.guard.scales_loss else None,
        )
    )


def on_skipped(state: TrainState, run: Run, step: int, stats: StepStats, verdict: int) -> None:
    """Collective. Say that an update was not made, and why; leave its rows for a look; end the run after too many."""
    health, limit = state.health, run.config.trainer.max_nonfinite_steps
    if verdict == OVERFLOW:
        return  # expected now and then, and no fault of the rows; the record counts it
    batches = all_ranks(run.accelerator, list(zip(torch.stack(stats.batch_losses).tolist(), stats.batch_rows)))
    if run.accelerator.is_main_process:
        numbers = {"loss": float(stats.loss), "grad_norm": float(stats.grad_norm)}
        run.log.message(
            leave_batch(run.config, step=step, verdict=verdict, **numbers, batches=batches, loader=run.loader)
        )
    if verdict == NONFINITE and limit is not None and health.nonfinite_in_row >= limit:
        log_pending(state, run)
        run.writer.finish(run.accelerator)
        run.log.message(f"given up after step {step}: {health.nonfinite_in_row} updates in a row were not finite")
        run.close()
        raise UserError(nonfinite_help(run.config, step, health.nonfinite_in_row))


def _row(stats: StepStats) -> Tensor:
    numbers = (stats.loss, stats.grad_norm, stats.num_targets, stats.num_tokens, stats.verdict)
    return torch.stack([number.double() for number in numbers])
