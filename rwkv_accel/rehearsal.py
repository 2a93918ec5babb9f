"""trainer.fast_dev_run: the whole way of a run in a few updates, of which nothing remains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rwkv_accel.config.schema import RunConfig
from rwkv_accel.loop import train
from rwkv_accel.runtime import is_main_process
from rwkv_accel.tracking.run_log import EVAL_FILE, LOSS_FILE, SAMPLES_FILE

MAX_NEW_TOKENS = 16
MAX_EXAMPLES = 32


def rehearse(config: RunConfig) -> None:
    """Train, evaluate, answer and save as the recipe says, for trainer.fast_dev_run updates; then clean up. Collective.

    Everything is written beside out_dir, on the file system that the run itself will use.
    """
    short = rehearsal_config(config)
    folder = Path(short.out_dir)
    try:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
        train(short)
        if is_main_process():
            print(summary(folder))  # noqa: T201
    finally:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def rehearsal_config(config: RunConfig) -> RunConfig:
    """The recipe of the rehearsal: few updates, every kind of work once, no tracker."""
    steps = config.trainer.fast_dev_run
    trainer = {
        "fast_dev_run": 0,
        "max_steps": steps,
        "max_epochs": max(steps, config.trainer.max_epochs),
        "min_steps": 0,
        "max_tokens": None,
        "max_time": None,
        "log_every_n_steps": 1,
    }
    evaluation: dict[str, Any] = {"every_n_epochs": None, "limit_batches": steps, "early_stop_patience": None}
    if config.eval.is_on:
        evaluation["every_n_steps"] = steps
    evaluation["limit_examples"] = min(config.eval.limit_examples or MAX_EXAMPLES, MAX_EXAMPLES)
    evaluation["answers_max_new_tokens"] = min(config.eval.answers_max_new_tokens, MAX_NEW_TOKENS)
    checkpoint: dict[str, Any] = {
        "resume": "none",
        "every_n_steps": None,
        "every_n_minutes": None,
        "keep_every_n_steps": None,
        "remote_url": None,
        "remote_options": {},
    }
    samples = {"every_n_steps": None, "max_new_tokens": min(config.samples.max_new_tokens, MAX_NEW_TOKENS)}
    return config.model_copy(
        update={
            "out_dir": f"{config.out_dir.rstrip('/')}.fast_dev_run",
            "trainer": config.trainer.model_copy(update=trainer),
            "eval": config.eval.model_copy(update=evaluation),
            "samples": config.samples.model_copy(update=samples),
            "checkpoint": config.checkpoint.model_copy(update=checkpoint),
            "tracking": config.tracking.model_copy(update={"trackers": ()}),
        }
    )


def summary(folder: Path) -> str:
    """What the rehearsal did, in one line."""
    losses, evaluations, samples = (_read(folder / name) for name in (LOSS_FILE, EVAL_FILE, SAMPLES_FILE))
    parts = [f"{len(losses)} updates, loss {losses[0]['loss']:.4f} to {losses[-1]['loss']:.4f}"]
    for entry in evaluations:
        measure = next(name for name in ("loss", "accuracy", "exact_match") if name in entry)
        parts.append(f"{entry['set']} {measure.replace('_', ' ')} {entry[measure]:.4f}")
    parts += [f"{len(entry['samples'])} answers" for entry in samples]
    parts.append(f"saves written, {losses[-1]['memory_bytes'] / 2**30:.1f} GiB at the peak")
    return f"fast_dev_run: {'; '.join(parts)}. All of it works; {folder} is removed again"


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
