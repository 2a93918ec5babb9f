"""The training loop. Read `train` from top to bottom: that is the whole run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_accel.config.schema import RunConfig
from rwkv_accel.data.batch import Batch
from rwkv_accel.guard import UpdateGuard
from rwkv_accel.heartbeat import beat
from rwkv_accel.hooks import (
    on_batch_end,
    on_batch_start,
    on_checkpoint,
    on_epoch_end,
    on_evaluate,
    on_interrupt,
    on_samples,
    on_train_end,
)
from rwkv_accel.interrupt import generator_states, set_generator_states
from rwkv_accel.run import Run, StepStats
from rwkv_accel.run_setup import set_up
from rwkv_accel.state import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: RunConfig) -> TrainState:
    """One run, from the recipe to the saved weights. Collective; returns where the run ended."""
    run, loader, state = set_up(config)
    after_update(state, run)
    while state.rows_consumed == loader.rows_per_epoch or not run.limits.reached(state):
        run.model.train()
        for window in run.log.watch(loader.windows(state.epoch, state.rows_consumed)):
            on_batch_start(state, run.optimizer, config.optim, run.total_steps)
            stats = train_window(run, window.batches)
            if stats is None:
                on_interrupt(state, run)
            state.advance(window.num_rows)
            on_batch_end(state, stats, run)
            after_update(state, run)
            if run.limits.reached(state):
                break
        if state.rows_consumed == loader.rows_per_epoch:
            on_epoch_end(state, run)

    on_train_end(state, run)
    return state


def after_update(state: TrainState, run: Run) -> None:
    """What the recipe wants after this many updates and is not done yet: a start also does what a stop left undone."""
    config = run.config
    if state.evaluated_step != state.step and is_due(run.eval_every, state.step, config.eval.at_start):
        on_evaluate(state, run)
    if state.sampled_step != state.step and is_due(config.samples.every_n_steps, state.step):
        on_samples(state, run)
    if 0 < state.step != run.checkpoint_step and run.cadence.due(state.step):
        on_checkpoint(state, run)


def is_due(every: int | None, step: int, at_start: bool = False) -> bool:
    """Whether something done every so many updates is due after this many."""
    return at_start if step == 0 else every is not None and step % every == 0


def train_window(run: Run, window: list[Batch]) -> StepStats | None:
    """One optimizer update: the exact mean loss over every target token of every rank in the window. Collective.

    Counting targets before the first forward makes the update independent of how the rows are spread over
    micro-batches and processes: backward() divides by the accumulation count and data parallelism averages over the
    ranks, so the scale undoes both and divides by the true count.

    Returns None when the ranks agreed to stop: nothing was updated, and the generators are back where they were.
    """
    accelerator, model, guard = run.accelerator, run.model, run.guard
    device, last = accelerator.device, len(window) - 1
    numbers = (sum(b.num_targets for b in window), sum(b.num_tokens for b in window))
    # Filled on the device: copying them there from the host would wait for it.
    counts = torch.stack([torch.full((), number, dtype=torch.float64, device=device) for number in numbers])
    counts = accelerator.reduce(counts, "sum")
    num_targets = counts[0].clamp_min(1)
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / num_targets * guard.loss_scale
    losses: list[Tensor] = []
    generators = generator_states(device)
    for index, batch in enumerate(window):
        if run.stop.agreed():
            set_generator_states(generators, device)
            return None
        # Set by hand: accelerator.accumulate() watches a prepared loader, and this one is not.
        accelerator.sync_gradients = index == last
        with nullcontext() if index == last else _no_sync(accelerator, model):
            beat("training, forward pass", in_step=True)
            loss = model(batch.ids_BT, batch.labels_BT, target_rows=batch.target_rows_R, cu_seqlens=batch.cu_seqlens)
            losses.append(loss.detach())
            beat("training, backward pass", in_step=True)
            if index == last:
                mean_loss = accelerator.reduce(torch.stack(losses).double().sum(), "sum") / num_targets
                scale = scale * guard.weigh(mean_loss)
            accelerator.backward(loss * scale.float())
    beat("training, update", in_step=True)
    grad_norm = _step(run, guard)
    return StepStats(mean_loss, grad_norm, counts[0], counts[1], guard.verdict, losses, [b.sample_ids for b in window])


def _no_sync(accelerator: Accelerator, model: Any) -> Any:
    # DeepSpeed is told the boundary through sync_gradients; its own no_sync would switch its bookkeeping off.
    return nullcontext() if _is_deepspeed(accelerator) else accelerator.no_sync(model)


def _step(run: Run, guard: UpdateGuard) -> Tensor:
    """Unscale, clip, update; the gradient's norm before clipping, as a device scalar."""
    if _is_deepspeed(run.accelerator):
        # All of it has happened within the last backward.
        norm = torch.as_tensor(run.model.get_global_grad_norm(), device=run.accelerator.device)
        guard.judge(torch.as_tensor(run.model.was_step_applied(), device=norm.device))
        return norm
    params = [p for p in run.model.parameters() if p.requires_grad]
    guard.unscale(params)
    norm = run.accelerator.clip_grad_norm_(params, run.config.trainer.gradient_clip_val or float("inf"))
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    guard.step(run.optimizer, norm)
    run.optimizer.zero_grad()
    return norm


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == "DEEPSPEED"
