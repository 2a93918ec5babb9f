"""From a recipe and a number of GPUs to a table of what fits, and one recommendation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rwkv_accel.config.schema import OptimConfig, RunConfig
from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.io import read_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.plan.communication import Cluster
from rwkv_accel.plan.memory import STRATEGIES, USABLE, Estimate, Job, checkpoint_bytes, estimate
from rwkv_accel.plan.trace import Activations, Weights, Work, activations_of, weights_of
from rwkv_accel.run_setup import build_loader, model_shape

RELEASED = {
    "0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "2.9b": (32, 2560), "7.2b": (32, 4096),
    "13.3b": (61, 4096),
}  # fmt: skip
"""Blocks and channels of the released models, by the size in their names."""
VOCAB_SIZE = 65536
MODES = ("none", "selective", "block", "offload")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
TRACED_ROWS = (1, 4)
"""Micro-batches that are traced; what lies between and beyond is on the line through them."""


@dataclass(frozen=True)
class Question:
    """What the command line asks."""

    gpus: int
    gpu_bytes: float
    gpus_per_node: int
    micro_batches: tuple[int, ...]
    throughput: float | None = None
    """Tokens per second of all processes together."""
    run_dir: str | None = None
    """Run whose loss_data.json says how fast it was."""
    size: str | None = None


@dataclass(frozen=True)
class RunPlan:
    """The answer."""

    model: str
    sources: list[str]
    """Where each kind of number comes from."""
    weights: Weights
    activations: dict[str, Activations]
    """By checkpointing mode, with the recipe's micro-batch."""
    estimates: list[Estimate]
    best: Estimate | None
    reason: str
    checkpoint_bytes: int
    steps: int | None
    tokens: int | None
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_run_plan(config: RunConfig, question: Question) -> RunPlan:
    """Every strategy with every micro-batch and checkpointing mode.

    Raises:
        UserError: the model's size is not known, or the batch does not divide.
    """
    shape, size_source = shape_of(config, question.size)
    precision = Precision.from_name(config.trainer.precision)
    trainer, data, optim = config.trainer, config.data, config.optim
    micros = sorted({*question.micro_batches, trainer.micro_batch_size})
    accumulations = {micro: _accumulation(config, micro, question.gpus) for micro in micros}
    if not any(accumulations.values()):
        raise UserError(
            f"trainer.global_batch_size {trainer.global_batch_size} is not a multiple of {question.gpus} GPUs times "
            f"any micro-batch of {micros}; change it, or --gpus"
        )
    packed = data.packing == "pack" and data.sampling == "documents"
    weights = weights_of(shape, config.peft, precision)

    def line(mode: str) -> dict[int, Activations]:
        work = Work(1, data.ctx_len, packed, mode, trainer.loss_chunk_rows)
        return {rows: activations_of(shape, config.peft, precision, replace(work, rows=rows)) for rows in TRACED_ROWS}

    lines = {mode: line(mode) for mode in MODES}
    cluster = Cluster(gpus_per_node=question.gpus_per_node)

    def job(accumulation: int) -> Job:
        return Job(question.gpus, optim.optimizer, accumulation, host_moments=optim.offload, cluster=cluster)

    estimates = [
        estimate(
            strategy,
            weights,
            _at(lines[mode], micro),
            job(accumulation),
            micro_batch_size=micro,
            tokens=data.ctx_len,
            checkpointing=mode,
        )
        for micro, accumulation in accumulations.items()
        if accumulation
        for mode in MODES
        for strategy in _strategies(question.gpus, optim)
    ]
    best, reason = recommend(estimates, question.gpu_bytes, trainer.gradient_checkpointing)
    steps, tokens, steps_source = length_of(config, question.gpus)
    speed, speed_source = speed_of(question, best, config)
    return RunPlan(
        model=f"{shape.n_layer} blocks of {shape.n_embd} channels, {weights.num_params:,} parameters, "
        f"{weights.num_trained:,} trained",
        sources=[
            f"size: {size_source}",
            "weights and activations: the model's own code, run on shapes without data, every token a target; on CPUs "
            "within 10% of what is measured, on GPUs not measured",
            "strategies: formulas of rwkv_accel/plan/memory.py, the libraries' default bucket sizes",
            "traffic: formulas of rwkv_accel/plan/communication.py",
            f"length: {steps_source}",
            f"speed: {speed_source}",
        ],
        weights=weights,
        activations={mode: _at(lines[mode], trainer.micro_batch_size) for mode in MODES},
        estimates=estimates,
        best=best,
        reason=reason,
        checkpoint_bytes=checkpoint_bytes(weights, optim.optimizer, host_moments=optim.offload),
        steps=steps,
        tokens=tokens,
        seconds=None if tokens is None or speed is None else tokens / speed,
    )


def shape_of(config: RunConfig, size: str | None) -> tuple[RWKV7Config, str]:
    """Sizes of the model and where they come from: asked for, the recipe's checkpoint or init, or the file's name."""
    if size is not None:
        return _sizes(size), f"--model {size}"
    path = config.model.path
    if path is None:
        return model_shape(config), "model.init"
    if Path(path).exists():
        return read_checkpoint(path).config, f"the header of {path}"
    named = re.search(r"(\d+\.\d+)b", Path(path).name.lower())
    if named is None or f"{named[1]}b" not in RELEASED:
        raise UserError(f"model.path {path} does not exist and names no released size; give --model 1.5b, say")
    return _sizes(f"{named[1]}b"), f"the name {Path(path).name}: the file is not here"


def _sizes(name: str) -> RWKV7Config:
    if name.lower() in RELEASED:
        n_layer, n_embd = RELEASED[name.lower()]
        return RWKV7Config.for_new_model(n_layer, n_embd, VOCAB_SIZE)
    numbers = name.split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"--model {name} is neither a released size ({', '.join(RELEASED)}) nor BLOCKSxCHANNELS[xVOCABULARY], "
            "24x2048 for example"
        )
    n_layer, n_embd, vocab_size = (*map(int, numbers), VOCAB_SIZE)[:3]
    return RWKV7Config.for_new_model(n_layer, n_embd, vocab_size)


def recommend(estimates: Sequence[Estimate], gpu_bytes: float, asked_mode: str) -> tuple[Estimate | None, str]:
    """The fastest estimate that fits, or None, and why; of equals the simpler strategy, then the larger micro-batch."""
    fitting = [e for e in estimates if e.peak <= USABLE * gpu_bytes]
    if not fitting:
        least = min(estimates, key=lambda e: e.peak)
        return None, (
            f"nothing fits: the least is {gib(least.peak)} per GPU ({least.strategy}, micro-batch "
            f"{least.micro_batch_size}, checkpointing {least.checkpointing}); take more or larger GPUs, a shorter "
            "data.ctx_len, peft.base_quant=nf4, or an adapter in place of full training"
        )

    def cost(e: Estimate) -> tuple[float, int, int]:
        # Host memory is behind a slow bus, which the formulas of the traffic leave out.
        offloaded = 10.0 if e.strategy.endswith("_offload") else 1.0
        seconds = offloaded * e.seconds / (e.micro_batch_size * e.accumulation)
        return (round(seconds, 9), STRATEGIES.index(e.strategy), -e.micro_batch_size)

    best = min(fitting, key=cost)
    simpler = [s for s in STRATEGIES[: STRATEGIES.index(best.strategy)] if any(e.strategy == s for e in estimates)]
    refused = [s for s in simpler if not any(e.strategy == s for e in fitting)]
    reason = "the least time per row of all that fit"
    if refused:
        reason += f"; {', '.join(refused)} fit with no micro-batch"
    if best.checkpointing != asked_mode:
        reason += f"; the recipe says trainer.gradient_checkpointing {asked_mode}"
    return best, reason


def length_of(config: RunConfig, gpus: int) -> tuple[int | None, int | None, str]:
    """Updates and tokens of the run, and where they come from. Reads the data where it is here."""
    trainer, paths = config.trainer, config.data.path
    paths = (paths,) if isinstance(paths, str) else paths
    data_is_here = not config.data.is_endless and all(Path(path).exists() for path in paths)
    if data_is_here and Path(config.model.path or ".").exists():
        steps = trainer.max_epochs * -(-build_loader(config, None).rows_per_epoch // _rows(config, gpus))
        steps = min(steps, trainer.max_steps or steps)
        source = "the data, rows taken as full"
        if trainer.max_tokens is not None:
            steps = min(steps, -(-trainer.max_tokens // (_rows(config, gpus) * config.data.ctx_len)))
    elif trainer.max_tokens is not None:
        return None, trainer.max_tokens, "trainer.max_tokens"
    elif trainer.max_steps is not None:
        steps, source = trainer.max_steps, "trainer.max_steps; the data is a stream or not here"
    else:
        return None, None, "unknown: the data is not here and trainer.max_steps is not set"
    return steps, steps * _rows(config, gpus) * config.data.ctx_len, source


def speed_of(question: Question, best: Estimate | None, config: RunConfig) -> tuple[float | None, str]:
    """Tokens per second of all processes, and where the number comes from."""
    if question.throughput is not None:
        return question.throughput, f"--throughput {question.throughput:g} tokens/s"
    if question.run_dir is not None:
        return measured_speed(Path(question.run_dir), question.gpus)
    if best is None:
        return None, "unknown"
    accumulation = _accumulation(config, best.micro_batch_size, question.gpus) or 1
    tokens = best.micro_batch_size * accumulation * config.data.ctx_len * question.gpus
    flops = Cluster().gpu_flops / 1e12
    return tokens / best.seconds, f"assumed: {flops:g} TFLOP/s per GPU reached, nothing of the traffic hidden"


def measured_speed(run_dir: Path, gpus: int) -> tuple[float, str]:
    """The second half of a run's records, in proportion to the number of processes."""
    try:
        records = json.loads((run_dir / "loss_data.json").read_text(encoding="utf-8"))
        processes = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--run {run_dir} is not the folder of a run: no loss_data.json and environment.json") from None
    if not records:
        raise UserError(f"--run {run_dir}: loss_data.json has no records yet")
    kt_s = median(record["kt_s"] for record in records[len(records) // 2 :])
    speed = 1000 * kt_s * gpus / processes
    return speed, f"{run_dir}: {kt_s:g} Kt/s on {processes} processes, taken in proportion"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _strategies(gpus: int, optim: OptimConfig) -> list[str]:
    if optim.offload:
        return ["single" if gpus == 1 else "ddp"]
    names = [name for name in STRATEGIES if name != "ddp"] if gpus == 1 else [n for n in STRATEGIES if n != "single"]
    return [name for name in names if optim.optimizer == "adamw" or not name.endswith("_offload")]


def _rows(config: RunConfig, gpus: int) -> int:
    trainer = config.trainer
    if trainer.global_batch_size is not None:
        return trainer.global_batch_size
    return trainer.micro_batch_size * (trainer.accumulate_grad_batches or 1) * gpus


def _accumulation(config: RunConfig, micro: int, gpus: int) -> int | None:
    """Micro-batches per update, or None where the global batch does not divide into such."""
    total = config.trainer.global_batch_size
    if total is None:
        return config.trainer.accumulate_grad_batches or 1
    return None if total % (micro * gpus) else total // (micro * gpus)


def _at(line: dict[int, Activations], rows: int) -> Activations:
    low, high = (line[r] for r in TRACED_ROWS)
    share = (rows - TRACED_ROWS[0]) / (TRACED_ROWS[1] - TRACED_ROWS[0])
    values = {key: round(a + share * (getattr(high, key) - a)) for key, a in asdict(low).items()}
    return Activations(**values)
