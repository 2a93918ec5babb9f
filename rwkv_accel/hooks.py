"""What happens around each optimizer update: plain functions that the loop calls in sight.

on_batch_start   before the first backward of an update: learning rate and weight decay
on_batch_end     after the update: numbers into the logs; waits for the device on log steps only
on_evaluate      at its cadence: validation loss, and what follows from it
on_samples       at its cadence and at the end: answers to the recipe's prompts
on_epoch_end     after an epoch: the PEFT-only (or full) save
on_checkpoint    at its cadence: everything a new start needs to go on
on_interrupt     when a signal asked to stop: the same under the name INTERRUPTED, then out
on_train_end     after the last update: the last save, the last answers and report.html
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwkv_accel.checkpoint import CheckpointWriter, SaveCadence, save_checkpoint
from rwkv_accel.checkpoint.collective import all_ranks
from rwkv_accel.checkpoint.format import INTERRUPTED
from rwkv_accel.checkpoint.run_lock import RunLock
from rwkv_accel.checkpoint.weights import BEST_DIR, WEIGHTS_DIR, save_weights
from rwkv_accel.config.schema import OptimConfig, RunConfig
from rwkv_accel.data.loader import TrainLoader
from rwkv_accel.data.template import TURN_END, chat_prompt
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError, WriteError
from rwkv_accel.evaluation import EvalResult, Evaluator, Results
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.guard import APPLIED, NONFINITE, OVERFLOW, UpdateGuard
from rwkv_accel.heartbeat import beat
from rwkv_accel.interrupt import Stopped, StopRequest, generator_states, set_generator_states
from rwkv_accel.limits import RunLimits
from rwkv_accel.peft.apply import adapter_buffers
from rwkv_accel.profiling import StepProfiler
from rwkv_accel.report import REPORT_FILE, write_report
from rwkv_accel.runtime import EXIT_STOPPED, requeue_file, started_file, unwrap
from rwkv_accel.schedules import lr_at, wd_at
from rwkv_accel.skipped import leave_batch, nonfinite_help
from rwkv_accel.state import TrainState
from rwkv_accel.tracking import RunLog, StepRecord
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
    watchdog: Watchdog
    """Keeps other runs out of the folder."""
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


def on_batch_start(state: TrainState, optimizer: Optimizer, optim: OptimConfig, total_steps: int) -> None:
    """Write lr_at(step) * lr_factor * lr_scale and wd_at(step) * wd_scale into the groups. Pure in the state.

    Must run before any backward of the update: under DeepSpeed the last backward also steps.
    """
    beat("training", step=state.step + 1, in_step=True)
    lr = lr_at(state.step, total_steps, optim) * state.control.lr_factor
    wd = wd_at(state.step, total_steps, optim)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = wd * group["wd_scale"]


def on_batch_end(state: TrainState, stats: StepStats, run: Run) -> None:
    """Keep the step's device scalars; on log steps read all of them in one wait and write one record."""
    optim, step = run.config.optim, state.step - 1  # the schedule's argument of the update just made
    lr = lr_at(step, run.total_steps, optim) * state.control.lr_factor
    run.pending.append((stats, lr, wd_at(step, run.total_steps, optim)))
    if not run.started:
        run.started = True
        marker = started_file()
        if run.accelerator.is_main_process and marker is not None:
            marker.touch()
    if state.step % run.config.trainer.log_every_n_steps == 0 or state.step == run.total_steps:
        log_pending(state, run)
    run.profiler.step(state.step)


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
        run.close()
        raise UserError(nonfinite_help(run.config, step, health.nonfinite_in_row))


def on_evaluate(state: TrainState, run: Run) -> None:
    """Collective. Validate on every set; the first loss decides on the rate, on `best/` and on stopping."""
    take_results(state, run, validate(state, run))
    state.evaluated_step = state.step


def validate(state: TrainState, run: Run) -> Results:
    """Collective. The result of each set. A stop saves and leaves here: nothing has been decided or logged yet."""
    try:
        with run.log.pause():
            return run.evaluator.run(run.accelerator, run.model, run.stop)
    except Stopped:
        on_interrupt(state, run)


def take_results(state: TrainState, run: Run, results: Results) -> None:
    """Collective. Log validation results and do what follows from the first loss."""
    for result in (*results.losses, *results.tasks):
        run.log.log_eval(state.step, state.epoch, result)
    if results.losses:
        _take_loss(state, run, results.losses[0])


def _take_loss(state: TrainState, run: Run, result: EvalResult) -> None:
    """Collective. What follows from the validation loss."""
    config, before = run.config.eval, state.control.lr_factor
    state.control.update(result.loss, state.step, config)
    if state.control.lr_factor != before:
        run.log.message(f"validation loss has stopped falling: learning rate x {state.control.lr_factor:g} from here")
    if config.keep_best and state.control.best_step == state.step:
        save(state, run, Path(run.config.out_dir) / BEST_DIR)


def on_epoch_end(state: TrainState, run: Run) -> None:
    """Collective. Validate, save the adapter (or the whole model) every `epoch_save` epochs, and checkpoint.

    The epoch counts as ended only after the validation, so that a stop within it comes back here.
    """
    log_pending(state, run)
    validate_every, save_every = run.config.eval.every_n_epochs, run.config.checkpoint.epoch_save
    is_validated = run.config.eval.is_on and validate_every and (state.epoch + 1) % validate_every == 0
    # The last update of the epoch may have been due for a validation of its own.
    is_validated = is_validated and state.evaluated_step != state.step
    results = validate(state, run) if is_validated else Results()
    state.end_epoch()
    run.log.epoch_line(state.epoch)
    take_results(state, run, results)
    if save_every and state.epoch % save_every == 0:
        save_latest(state, run, f"epoch-{state.epoch:04d}")
    on_checkpoint(state, run)


def on_interrupt(state: TrainState, run: Run) -> NoReturn:
    """Collective. Save everything under the name INTERRUPTED, tell the launcher, and leave."""
    run.profiler.close()
    on_checkpoint(state, run, INTERRUPTED)
    run.writer.finish(run.accelerator)
    marker = requeue_file()
    if run.accelerator.is_main_process and marker is not None:
        marker.write_text(f"{state.step}\n", encoding="utf-8")
    why = run.stop.reason or "another process"
    run.log.message(f"stopped by {why} after step {state.step}, saved; start the same command again to continue")
    finish_uploads(run)
    run.close()
    raise SystemExit(EXIT_STOPPED)


def on_checkpoint(state: TrainState, run: Run, name: str | None = None) -> None:
    """Collective. Write the resume checkpoint of this step, with the numbers that wait for their record."""
    beat("saving a checkpoint", in_step=True)
    read_pending(state, run)
    model = unwrap(run.model)
    with run.log.pause():
        save_checkpoint(
            run.accelerator,
            run.model,
            run.optimizer,
            state.state_dict(),
            writer=run.writer,
            name=name or f"step-{state.step:08d}",
            config=run.identity,
            base_digest=run.base_digest,
            extra={
                "log": run.log.state(),
                "saved_step": run.saved_step,
                "unlogged": run.unlogged,
                "data": run.loader.state_dict(state.rows_consumed),
            },
            extra_tensors=adapter_buffers(model),
        )
    for failure in run.writer.take_failures():
        run.log.message(f"{failure}; the training goes on")
    run.checkpoint_step = state.step
    run.cadence.restart()


def on_train_end(state: TrainState, run: Run) -> None:
    """Collective. Save what is not saved yet, and answer the recipe's prompts."""
    log_pending(state, run)
    run.profiler.close()
    if (reason := run.limits.reason(state)) is not None:
        run.log.message(reason)
    failure = None
    if run.saved_step != state.step:
        failure = save_latest(state, run, f"step-{state.step:08d}")
    if run.checkpoint_step != state.step:
        on_checkpoint(state, run)
    run.writer.finish(run.accelerator)
    if summary := run.loader.summary(state.rows_consumed):
        run.log.message(summary)
    run.stop.release()
    if state.sampled_step != state.step:
        on_samples(state, run)
    run.log.message(f"finished after step {state.step}")
    if run.accelerator.is_main_process:
        report(run)
    finish_uploads(run)
    run.close()
    run.accelerator.wait_for_everyone()
    if failure is not None:
        raise failure


def report(run: Run) -> None:
    """Write report.html. A run that has ended well does not fail for want of it."""
    out_dir = Path(run.config.out_dir)
    try:
        run.log.message(f"report: {write_report([out_dir], out_dir / REPORT_FILE)}")
    except UserError as error:
        run.log.message(f"report: {error}")


def finish_uploads(run: Run) -> None:
    """Collective. Wait for what is on its way to remote storage, within bounds; say what has not arrived."""
    left = run.writer.finish_uploads(run.accelerator)
    if left:
        run.log.message(
            f"not uploaded to {run.config.checkpoint.remote_url}: {', '.join(left)}; all of it is in "
            f"{run.config.out_dir}, and the same command started again tries once more"
        )


def save_latest(state: TrainState, run: Run, name: str) -> WriteError | None:
    """Collective. Write adapter/<name> and remember that this step is saved; a refusal as in `save`."""
    failure = save(state, run, Path(run.config.out_dir) / WEIGHTS_DIR / name)
    if failure is None:
        run.saved_step = state.step
    return failure


def save(state: TrainState, run: Run, folder: Path) -> WriteError | None:
    """Collective. Write the trained weights into a folder. A disk that refuses does not end the run: it is told, and
    returned."""
    beat("saving the weights", in_step=True)
    read_pending(state, run)
    try:
        with run.log.pause():
            save_weights(
                run.accelerator,
                run.model,
                run.optimizer,
                config=run.config,
                state=state,
                folder=folder,
                base_path=run.base_path,
                base_digest=run.base_digest,
            )
    except WriteError as failure:
        run.log.message(f"{failure}; the training goes on")
        return failure
    if run.writer.uploads is not None:
        run.writer.uploads.add_weights(folder, state.step)
    run.log.message(f"saved {folder}")
    return None


def on_samples(state: TrainState, run: Run) -> None:
    """Collective. Answer the recipe's prompts on the main process, into the log, samples.json and the trackers."""
    samples = run.config.samples
    if not samples.prompts:
        return
    if is_sharded(run.accelerator):
        if state.step == run.total_steps:
            run.log.message(
                f"samples: parameters are sharded; use `python -m rwkv_accel.generate {run.config.out_dir}`"
            )
        return
    answers = _answers(run) if run.accelerator.is_main_process else []
    if run.stop.agreed():
        on_interrupt(state, run)
    run.log.log_samples(state.step, state.epoch, answers)
    state.sampled_step = state.step


def _answers(run: Run) -> list[dict[str, Any]]:
    """Generated on this process alone; cut short by a stop."""
    samples, model = run.config.samples, unwrap(run.model)
    was_training, generators = model.training, generator_states(run.accelerator.device)
    with run.log.pause():
        answers = TextGenerator(model.eval(), run.tokenizer, should_stop=run.stop.wanted).generate(
            [prompt if samples.raw else chat_prompt(prompt) for prompt in samples.prompts],
            max_new_tokens=samples.max_new_tokens,
            temperature=samples.temperature,
            top_p=samples.top_p,
            stop=() if samples.raw else (TURN_END,),
            seed=run.config.trainer.seed,
        )
    model.train(was_training)
    # Sampling must not change the dropout of the steps that follow.
    set_generator_states(generators, run.accelerator.device)
    return [
        {"prompt": prompt, "text": answer.text, "stopped": answer.stop_reason != "length"}
        for prompt, answer in zip(samples.prompts, answers)
    ]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no single process holds whole parameters (ZeRO-3, FSDP2)."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == "FSDP" or (plugin is not None and plugin.zero_stage == 3)


def _row(stats: StepStats) -> Tensor:
    numbers = (stats.loss, stats.grad_norm, stats.num_targets, stats.num_tokens, stats.verdict)
    return torch.stack([number.double() for number in numbers])
