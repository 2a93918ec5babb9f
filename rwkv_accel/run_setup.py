"""From a recipe to everything the loop needs: folder, data, base weights, model, optimizer, logs, resumed state."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rwkv_accel.checkpoint import (
    CheckpointWriter,
    SaveCadence,
    check_same_run,
    find_resume_on_all,
    load_checkpoint,
    read_state,
)
from rwkv_accel.checkpoint.collective import on_main, once_per_node
from rwkv_accel.checkpoint.portable import read_extra_tensors
from rwkv_accel.checkpoint.remote import Remote, open_remote
from rwkv_accel.checkpoint.run_lock import lock_run_folder
from rwkv_accel.checkpoint.weights import INIT_FILE, base_checkpoint, has_weights
from rwkv_accel.config.base import share_of
from rwkv_accel.config.load import dump_config
from rwkv_accel.config.schema import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, RunConfig, TrainerConfig
from rwkv_accel.data.loader import TrainLoader, build_train_loader
from rwkv_accel.data.packing import Subset
from rwkv_accel.data.prompt import sample_prompts
from rwkv_accel.data.sources import set_names
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.disk import foresee_space, prove_writable
from rwkv_accel.errors import UserError
from rwkv_accel.evaluation import Evaluator, token_lengths
from rwkv_accel.guard import UpdateGuard
from rwkv_accel.heartbeat import beat
from rwkv_accel.interrupt import StopRequest
from rwkv_accel.limits import RunLimits
from rwkv_accel.model.compiled import check_compiler, compile_blocks
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.model.io import checkpoint_digest, read_checkpoint
from rwkv_accel.model.offload import offload_remark
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.optim import build_optimizer, check_offload_strategy
from rwkv_accel.peft.apply import load_model_and_apply_peft, print_model_param
from rwkv_accel.profiling import StepProfiler
from rwkv_accel.progress import set_progress_mode
from rwkv_accel.run import Run, is_sharded
from rwkv_accel.run_facts import environment, kernels_of, model_facts
from rwkv_accel.runtime import (
    build_accelerator,
    check_launch,
    check_offload,
    prepare,
    set_engine_switches,
    set_seed,
    strategy_of,
    world_size,
)
from rwkv_accel.state import TrainState
from rwkv_accel.tasks.run import read_tasks
from rwkv_accel.tracking import ENVIRONMENT_FILE, RUN_FILE, RunLog
from rwkv_accel.tracking.flops import compute_of
from rwkv_accel.watchdog import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def set_up(config: RunConfig) -> tuple[Run, TrainLoader, TrainState]:
    """Everything before the first step. Cheap checks come first: a mistake must cost seconds. Collective."""
    started_at, trainer = time.monotonic(), config.trainer
    stop = StopRequest().install()
    set_engine_switches(trainer)
    check_launch(trainer)
    set_seed(trainer.seed)
    set_progress_mode(config.tracking.progress)
    accelerator = build_accelerator(trainer, trainer.micro_batches(world_size()))
    check_offload(accelerator, config.optim.optimizer)
    check_offload_strategy(config.optim, strategy_of(accelerator))
    check_compiler(trainer.compile, accelerator.device.type, strategy_of(accelerator))
    lock = lock_run_folder(accelerator, config.out_dir)
    remote = open_remote_on_main(accelerator, config.checkpoint)
    resume_from = find_resume_on_all(accelerator, config.out_dir, config.checkpoint, remote.store if remote else None)
    saved = read_state(resume_from) if resume_from else None
    on_main(accelerator, lambda: prepare_out_dir(config))
    watchdog = Watchdog(
        config.out_dir,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        timeout=trainer.stall_timeout_seconds,
        action=trainer.stall_action,
    ).start()
    loader, evaluator = build_loader(config, accelerator), build_evaluator(config, accelerator)
    check_answers(config, accelerator)
    sample_prompts(config.samples, config.data.template)  # a template that cannot write them is told here
    identity = identity_of(config, loader)
    if saved:
        check_same_run(saved["config"], identity, resume_from)
        check_same_data(saved["extra"].get("data_digest"), loader.digest, resume_from)
    base, digest = prepare_base(config, accelerator)
    if saved:
        check_same_base(saved["base_digest"], digest, resume_from)
    # What an adapter brought at the first start is in the checkpoint; its folder may be gone.
    peft = config.peft.model_copy(update={"load_path": None}) if saved else config.peft
    model = load_model_and_apply_peft(
        base,
        peft,
        precision=Precision.from_name(trainer.precision),
        seed=trainer.seed,
        frozen_tensors=read_extra_tensors(resume_from) if resume_from else None,
        encode=build_tokenizer(config.data.tokenizer).encode,
    )
    kernels = kernels_of(model, accelerator.device.type)
    apply_switches(model, trainer, accelerator.device.type)
    optimizer = build_optimizer(model, config.optim)
    if accelerator.is_main_process:
        print_model_param(model)
    facts = on_main(accelerator, lambda: look_ahead(config, model))
    gpu = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else None
    compute = compute_of(model, gpu, accelerator.num_processes)
    model, optimizer = prepare(accelerator, model, optimizer, trainer, loader.micro_batches_per_window)
    state = TrainState()
    if resume_from:
        saved = load_checkpoint(accelerator, model, optimizer, resume_from)
        state.load_state_dict(saved["state"])
    total_steps = loader.total_steps(trainer.max_epochs, trainer.max_steps, trainer.max_tokens)
    limits = RunLimits(trainer, config.eval, total_steps, stop, started_at=started_at)
    log = RunLog.open(
        config,
        is_main=accelerator.is_main_process,
        total_steps=total_steps,
        resume_step=state.step if saved else None,
        device=accelerator.device,
        facts=facts,
        compute=compute,
    )
    log.message(kernels)
    log.message(loader.describe())
    run = Run(
        config,
        accelerator,
        model,
        optimizer,
        log,
        UpdateGuard(trainer, state.health, accelerator.device),
        stop,
        CheckpointWriter(config.out_dir, config.checkpoint, remote),
        SaveCadence(config.checkpoint),
        limits,
        total_steps,
        eval_every=validation_cadence(config.eval, loader.windows_per_epoch, total_steps, log),
        profiler=StepProfiler.open(trainer.profiler, config.out_dir, log.message, is_main=accelerator.is_main_process),
        base_path=os.path.abspath(str(base.path)),
        base_digest=digest,
        evaluator=evaluator,
        tokenizer=evaluator.tokenizer,
        identity=identity,
        loader=loader,
        lock=lock,
        watchdog=watchdog,
    )
    if saved:
        loader.load_state_dict(saved["extra"].get("data"))
        log.restore(saved["extra"]["log"])
        run.checkpoint_step = state.step
        run.unlogged = saved["extra"]["unlogged"]
        # A checkpoint may have come without the weights saved before it.
        if on_main(accelerator, lambda: has_weights(config.out_dir)):
            run.saved_step = saved["extra"]["saved_step"]
        if run.writer.uploads is not None and resume_from is not None:
            run.writer.uploads.add_existing(resume_from, run.saved_step, state.control.best_step)
        log.message(f"continuing from {resume_from}: step {state.step} of {total_steps}")
    stop.cadence = run.cadence
    stop.defer(accelerator)
    return run, loader, state


def apply_switches(model: RWKV7, trainer: TrainerConfig, device_type: str) -> None:
    """How the model computes a step."""
    model.gradient_checkpointing = trainer.gradient_checkpointing
    model.l2wrap, model.loss_chunk_rows = trainer.l2wrap, trainer.loss_chunk_rows
    compile_blocks(model, trainer.compile)
    if (remark := offload_remark(trainer.gradient_checkpointing, device_type)) is not None:
        logger.warning(remark)


def open_remote_on_main(accelerator: Accelerator, config: CheckpointConfig) -> Remote | None:
    """The storage of the recipe on the main process, if it names one; every rank raises if it cannot be used."""
    opened: list[Remote | None] = [None]

    def on_this() -> None:
        opened[0] = open_remote(config)

    on_main(accelerator, on_this)
    return opened[0]


def identity_of(config: RunConfig, loader: TrainLoader) -> dict[str, Any]:
    """The resolved recipe with the rows per update filled in: what makes a run this run on any number of processes."""
    dump = config.model_dump(mode="json")
    dump["trainer"]["global_batch_size"] = loader.global_batch_size
    return dump


def check_same_data(saved_digest: str | None, digest: str | None, checkpoint: Any) -> None:
    """Raises UserError unless a checkpoint stands at a place in these rows. One that does not say passes."""
    if saved_digest is not None and saved_digest != digest:
        raise UserError(
            f"data.path no longer gives the rows that it gave when checkpoint {checkpoint} was written, so its place "
            "among them means nothing; put the files back to continue, or give another out_dir for a new run "
            "(peft.load_path or model.path can start it from the weights of this one)"
        )


def check_same_base(saved_digest: str, digest: str, checkpoint: Any) -> None:
    """Raises UserError unless a checkpoint was made on this base model."""
    if saved_digest != digest:
        raise UserError(
            f"checkpoint {checkpoint} was made on another base model ({saved_digest[:19]}..., this one is "
            f"{digest[:19]}...); give the same model.path, or another out_dir for a fresh start"
        )


def build_loader(config: RunConfig, accelerator: Accelerator | None) -> TrainLoader:
    """The training rows of this rank; the vocabulary is known before any weight is read."""
    share = config.eval.split_fraction
    subset = Subset(share, config.trainer.seed, held_out=False) if share else None
    return _loader(config, config.data, config.trainer, accelerator, subset)


def build_evaluator(config: RunConfig, accelerator: Accelerator) -> Evaluator:
    """Everything that the eval section asks for. Collective; a mistake in its files is found before the weights."""
    tokenizer, vocab_size = build_tokenizer(config.data.tokenizer), model_shape(config).vocab_size
    sets = build_eval_sets(config, accelerator)
    lengths = token_lengths(tokenizer, vocab_size) if sets else torch.empty(0)
    return Evaluator(config.eval, tokenizer, lengths, sets, read_tasks(config, tokenizer, vocab_size))


def check_answers(config: RunConfig, accelerator: Accelerator) -> None:
    """Raises UserError for eval.answers_path where no process holds whole weights to reply with."""
    if config.eval.answers_path is not None and is_sharded(accelerator):
        raise UserError(
            "eval.answers_path needs whole weights, this Accelerate config shards them: take ddp, zero1 or zero2, or "
            f"run `python -m rwkv_accel.evaluate {config.out_dir} --answers ...` after the run"
        )


def validation_cadence(config: EvalConfig, windows_per_epoch: int, total_steps: int, log: RunLog) -> int | None:
    """Updates between validations within an epoch. Tells of a run that ends before its first one."""
    every = config.every_n_steps
    if isinstance(every, float):
        every = share_of(every, windows_per_epoch)
    first = [every or math.inf, (config.every_n_epochs or math.inf) * windows_per_epoch]
    if config.is_on and not config.at_start and total_steps < min(first):
        log.message(
            f"eval: no validation falls within the {total_steps} updates of this run; set eval.every_n_steps to that "
            "or less, or eval.at_start=true"
        )
    return every


def build_eval_sets(config: RunConfig, accelerator: Accelerator | None) -> list[tuple[str, TrainLoader]]:
    """(name, rows) of each validation set, in the order of the recipe."""
    if not config.eval.has_loss:
        return []
    trainer = config.trainer.model_copy(
        update={
            "global_batch_size": None,
            "accumulate_grad_batches": 1,
            "limit_train_batches": None,
            "overfit_batches": None,
        }
    )
    if config.eval.path is None:
        subset = Subset(config.eval.split_fraction, config.trainer.seed, held_out=True)
        data = config.data.model_copy(update={"shuffle": False, "weights": None})
        return [("validation", _loader(config, data, trainer, accelerator, subset))]
    paths = (config.eval.path,) if isinstance(config.eval.path, str) else config.eval.path
    plain: dict[str, Any] = {"shuffle": False, "weights": None, "sampling": "documents", "streaming": False}
    plain["max_documents"] = config.eval.limit_examples
    return [
        (name, _eval_loader(config, config.data.model_copy(update={**plain, "path": path}), trainer, accelerator))
        for name, path in zip(set_names(paths), paths)
    ]


def _eval_loader(config: RunConfig, data: DataConfig, trainer: TrainerConfig, accelerator: Accelerator) -> TrainLoader:
    try:
        return _loader(config, data, trainer, accelerator)
    except UserError as error:
        raise UserError(f"{error} (read for eval.path)") from None


def _loader(
    config: RunConfig,
    data: DataConfig,
    trainer: TrainerConfig,
    accelerator: Accelerator | None,
    subset: Subset | None = None,
) -> TrainLoader:
    return build_train_loader(
        data,
        trainer,
        rank=accelerator.process_index if accelerator else 0,
        world_size=accelerator.num_processes if accelerator else world_size(),
        device=accelerator.device if accelerator else torch.device("cpu"),
        vocab_size=model_shape(config).vocab_size,
        run_first=(lambda action: once_per_node(accelerator, action)) if accelerator else None,
        subset=subset,
    )


def model_shape(config: RunConfig) -> RWKV7Config:
    """Sizes of the model: from the checkpoint's header, or from model.init. Reads no weights."""
    init = config.model.init
    if init is None:
        assert config.model.path is not None
        return read_checkpoint(base_checkpoint(config.model.path)).config
    vocab_size = init.vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    return RWKV7Config.for_new_model(init.n_layer, init.n_embd, vocab_size, init.head_size)


def prepare_base(config: RunConfig, accelerator: Accelerator) -> tuple[ModelConfig, str]:
    """The model section with the file that holds the base, and the base's digest. Collective."""
    beat("loading the model")
    init = config.model.init
    if init is not None:
        path = Path(config.out_dir) / INIT_FILE

        def write_init() -> None:
            if not path.exists():
                generate_init_weight(model_shape(config), path, seed=init.seed)

        on_main(accelerator, write_init)
    else:
        assert config.model.path is not None
        path = base_checkpoint(config.model.path)
    digest = on_main(accelerator, lambda: checkpoint_digest(path))
    return config.model.model_copy(update={"path": str(path), "init": None}), digest


def prepare_out_dir(config: RunConfig) -> None:
    """Create the run folder, prove that it can be written, and leave the resolved recipe there."""
    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        prove_writable(out_dir)
        _write_atomic(out_dir / RUN_FILE, dump_config(config))
        _write_atomic(out_dir / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out_dir {out_dir} cannot be written: {error.strerror}; choose another out_dir") from None


def look_ahead(config: RunConfig, model: Any) -> dict[str, Any]:
    """With the model whole and at hand: is there room for its checkpoints? Returns the run's facts."""
    if (warning := foresee_space(config, model)) is not None:
        logger.warning(warning)
    return write_environment(config, {"model": model_facts(model)})


def write_environment(config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Versions, code, hardware and these facts, as environment.json keeps them."""
    facts = {**environment(), **facts}
    _write_atomic(Path(config.out_dir) / ENVIRONMENT_FILE, json.dumps(facts, indent=1) + "\n")
    return facts


def _write_atomic(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
