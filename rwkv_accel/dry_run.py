"""What a start would find out before its first step, without reading weights or writing anything."""

from __future__ import annotations

import os
from pathlib import Path

from rwkv_accel.checkpoint import check_same_run, find_resume, read_state
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.data.prompt import sample_prompts
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.errors import UserError
from rwkv_accel.peft.apply import check_same_peft
from rwkv_accel.peft.foreign import read_any_adapter
from rwkv_accel.peft.plan import make_plan
from rwkv_accel.run_setup import build_eval_sets, build_loader, check_same_data, identity_of, model_shape
from rwkv_accel.runtime import is_main_process
from rwkv_accel.tasks.run import read_tasks


def dry_run(config: RunConfig) -> None:
    """Check everything that can be checked without reading the base's weights, and print the plan. Writes nothing.

    What lies behind a URL is not asked for.
    """
    check_out_dir(config)
    shape = model_shape(config)
    plan = make_plan(shape, config.peft)
    loader = build_loader(config, None)
    build_eval_sets(config, None)
    read_tasks(config, build_tokenizer(config.data.tokenizer), shape.vocab_size)
    sample_prompts(config.samples, config.data.template)
    resume_from = None if "://" in config.checkpoint.resume else find_resume(config.out_dir, config.checkpoint.resume)
    saved = read_state(resume_from) if resume_from else None
    if saved:
        check_same_run(saved["config"], identity_of(config, loader), resume_from)
        check_same_data(saved["extra"].get("data_digest"), loader.digest, resume_from)
    elif config.peft.load_path is not None:
        meta, _ = read_any_adapter(config.peft.load_path, method=config.peft.method, alpha=config.peft.alpha)
        check_same_peft(meta, config.peft)
    if is_main_process():
        trainer = config.trainer
        steps = loader.total_steps(trainer.max_epochs, trainer.max_steps, trainer.max_tokens)
        print(f"model: {shape}")  # noqa: T201
        print(f"trained: {len(plan.adapters)} adapters, {len(plan.trained)} base parameters")  # noqa: T201
        print(loader.describe())  # noqa: T201
        print(f"plan: {steps} updates of {loader.global_batch_size} rows")  # noqa: T201
        if saved:
            print(f"resume: from {resume_from}, after step {saved['state']['step']}")  # noqa: T201


def check_out_dir(config: RunConfig) -> None:
    """Raises UserError where the run's folder could not be made or written. Makes nothing."""
    existing = Path(config.out_dir).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "may not be written" if existing.is_dir() else "is a file"
        raise UserError(f"out_dir {config.out_dir} cannot be written: {existing} {why}; choose another out_dir")
