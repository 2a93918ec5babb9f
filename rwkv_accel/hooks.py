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

from pathlib import Path
from typing import Any, NoReturn

from torch.optim import Optimizer

from rwkv_accel.checkpoint import CheckpointWriteError, save_checkpoint
from rwkv_accel.checkpoint.format import INTERRUPTED
from rwkv_accel.checkpoint.weights import BEST_DIR
from rwkv_accel.config.schema import OptimConfig
from rwkv_accel.data.prompt import sample_prompts
from rwkv_accel.data.template import TURN_END
from rwkv_accel.evaluation import EvalResult, Results
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.heartbeat import beat
from rwkv_accel.interrupt import Stopped, generator_states, set_generator_states
from rwkv_accel.peft.apply import adapter_buffers
from rwkv_accel.records import log_pending, read_pending
from rwkv_accel.run import Run, StepStats, is_sharded
from rwkv_accel.runtime import EXIT_STOPPED, requeue_file, started_file, unwrap
from rwkv_accel.saving import (
    finish_uploads,
    last_failure,
    report,
    save,
    save_latest,
    tell_failures,
    where_a_start_continues,
)
from rwkv_accel.schedules import lr_at, wd_at
from rwkv_accel.state import TrainState


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
    """Collective. Save everything under the name INTERRUPTED, tell the launcher, and leave.

    Raises:
        CheckpointWriteError: on every rank: the disk refused. A launcher must not start the run again before it is
            mended, so it is told nothing.
    """
    run.profiler.close()
    on_checkpoint(state, run, INTERRUPTED)
    failure = last_failure(run)
    why = f"stopped by {run.stop.reason or 'another process'} after step {state.step}"
    marker = requeue_file()
    if failure is None:
        if run.accelerator.is_main_process and marker is not None:
            marker.write_text(f"{state.step}\n", encoding="utf-8")
        run.log.message(f"{why}, saved; start the same command again to continue")
    finish_uploads(run)
    run.close()
    if failure is not None:
        raise CheckpointWriteError(f"{why}, but {failure}; {where_a_start_continues(run)}")
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
                "data_digest": run.loader.digest,
            },
            extra_tensors=adapter_buffers(model),
        )
    if name is None:
        tell_failures(run)
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
    failure = last_failure(run) or failure
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
    template = run.config.data.template
    was_training, generators = model.training, generator_states(run.accelerator.device)
    with run.log.pause():
        answers = TextGenerator(model.eval(), run.tokenizer, should_stop=run.stop.wanted).generate(
            sample_prompts(samples, template),
            max_new_tokens=samples.max_new_tokens,
            temperature=samples.temperature,
            top_p=samples.top_p,
            stop=(TURN_END,) if template == "rwkv" and not samples.raw else (),
            seed=run.config.trainer.seed,
        )
    model.train(was_training)
    # Sampling must not change the dropout of the steps that follow.
    set_generator_states(generators, run.accelerator.device)
    return [
        {"prompt": prompt, "text": answer.text, "stopped": answer.stop_reason != "length"}
        for prompt, answer in zip(samples.prompts, answers)
    ]
