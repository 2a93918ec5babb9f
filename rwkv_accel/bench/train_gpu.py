"""Whole LoRA training steps on a GPU: speed against another op and other layers in the same model, and peak memory.

The baseline is this project's model with flash-linear-attention's op in place of ours and HF peft's LoRA layers in
place of ours; everything else is the same code. Memory is what lies above the bytes of the (quantised) base, adapters
included, and is compared with the count of `bench memory`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_accel.bench.harness import Options, Row, in_fresh_process
from rwkv_accel.bench.memory import (
    BASES,
    CTX,
    GIGABYTE,
    HEAD_SIZE,
    RANK,
    SHAPES,
    SMALL,
    SMALL_OPTIM,
    VOCAB,
    counted,
    label,
)
from rwkv_accel.bench.wkv7_gpu import Op, load_fla, with_log_decay
from rwkv_accel.config.schema import LINEAR_TARGETS, ModelConfig, OptimConfig, PeftConfig, TrainerConfig
from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.io import load_model, save_checkpoint
from rwkv_accel.model.precision import Precision
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.ops.wkv7 import BACKENDS, select_backend
from rwkv_accel.optim import build_optimizer
from rwkv_accel.peft.apply import load_model_and_apply_peft

SPEED_SHAPE, SPEED_CTX = "1.5B", 4096
OURS, THEIRS = "ours", "op of flash-linear-attention, layers of HF peft"


def measure(options: Options) -> Iterator[Row]:
    """A process that fails is told of at the end: it must not take the other rows along."""
    failures: list[RuntimeError] = []
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base.pth"
            config = RWKV7Config.for_new_model(*SHAPES[shape], VOCAB, HEAD_SIZE)
            random_checkpoint(config, base)
            common = {"base": str(base), "repeats": options.repeats, "device": options.device}
            if shape == SPEED_SHAPE:
                yield from _speed({**common, "ctx": SPEED_CTX, "quant": "none", "small": False}, failures)
            for quant in BASES:
                found = _try({**common, "ctx": CTX, "quant": quant, "small": True, "who": OURS}, failures)
                if found is None:
                    continue
                above = (found["peak_mib"] - found["base_mib"]) * 2**20 / GIGABYTE
                expected, _ = counted(shape, quant, SMALL, SMALL_OPTIM)
                yield Row(label(shape, quant), above, "GB", "by count", expected / above)
    if failures:
        raise failures[0]


def random_checkpoint(config: RWKV7Config, path: Path) -> None:
    """bf16 weights of the right shapes, the same values over and over: an initialisation of billions takes minutes."""
    values = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def weight(shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        return values.repeat(-(-count // len(values)))[:count].view(shape)

    save_checkpoint({name: weight(shape) for name, shape in parameter_shapes(config).items()}, path)


def _try(arguments: dict[str, Any], failures: list[RuntimeError]) -> dict[str, Any] | None:
    try:
        return in_fresh_process(__name__, arguments)
    except RuntimeError as error:
        failures.append(error)
        return None


def _speed(arguments: dict[str, Any], failures: list[RuntimeError]) -> list[Row]:
    what = f"{SPEED_SHAPE} shape, LoRA r={RANK}, ctx {arguments['ctx']}"
    missing = [name for name in ("fla", "peft") if find_spec(name) is None]
    tried = {who: _try({**arguments, "who": who}, failures) for who in (OURS, *([] if missing else [THEIRS]))}
    found = {who: numbers for who, numbers in tried.items() if numbers is not None}
    if OURS not in found:
        return []
    ours = found[OURS]["tokens_per_second"]
    if THEIRS not in found:
        why = f"{missing[0]} is not installed" if missing else "it failed"
        return [Row(f"{what}, ours", ours, "tokens/s", note=f"baseline not measured: {why}")]
    theirs = found[THEIRS]["tokens_per_second"]
    rows = [
        Row(f"{what}, ours", ours, "tokens/s", THEIRS, ours / theirs),
        Row(f"{what}, {THEIRS}", theirs, "tokens/s"),
    ]
    peaks = {who: numbers["peak_mib"] for who, numbers in found.items()}
    rows.append(Row(f"{what}, ours: peak memory", peaks[OURS], "MiB", THEIRS, peaks[THEIRS] / peaks[OURS]))
    return rows


def as_theirs(model: RWKV7, op: Op, device_type: str) -> RWKV7:
    """The same model with their op and their LoRA layers: adapters in fp32, as ours, which torch.autocast multiplies in
    bf16, as their users have it."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    def backend(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, state, borders = arguments
        if state is not None or borders is not None:
            raise ValueError("the baseline runs plain rows only")
        return with_log_decay(op)(*tensors)

    BACKENDS["baseline"] = backend
    select_backend.cache_clear()
    model.wkv_backend = "baseline"
    model.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEAR_TARGETS))
    model = inject_adapter_in_model(lora, model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.forward = torch.autocast(device_type, torch.bfloat16)(layer.forward)
    return model


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids_BT: Tensor) -> float:
    """One update; the loss, read from the device."""
    labels_BT = ids_BT[:, 1:].contiguous()
    rows = torch.arange(labels_BT.numel(), device=ids_BT.device)
    loss = model(ids_BT[:, :-1], labels_BT, target_rows=rows) / labels_BT.numel()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def build(arguments: dict[str, Any], op: Op | None = None) -> nn.Module:
    """The model of one candidate, on its device. small: with the settings that take least memory."""
    trainer = SMALL if arguments["small"] else TrainerConfig(precision="bf16-mixed")
    precision = Precision.from_name(trainer.precision)
    if arguments["who"] == OURS:
        peft = PeftConfig(rank=RANK, base_quant=arguments["quant"])
        model = load_model_and_apply_peft(ModelConfig(path=arguments["base"]), peft, precision=precision)
    else:
        model = as_theirs(load_model(arguments["base"], precision), op or _installed_fla(), arguments["device"])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(precision.trainable)
    model.gradient_checkpointing, model.loss_chunk_rows = trainer.gradient_checkpointing, trainer.loss_chunk_rows
    return model.to(arguments["device"])


def _installed_fla() -> Op:
    name, op = load_fla()
    assert op is not None, name
    return op


def _run(arguments: dict[str, Any]) -> dict[str, float]:
    model = build(arguments)
    optimizer = build_optimizer(model, SMALL_OPTIM if arguments["small"] else OptimConfig())
    # What trains is no part of the base, nor what is made of it while it trains.
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    base = sum(t.numel() * t.element_size() for t in frozen)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, VOCAB, (1, arguments["ctx"] + 1), generator=generator).to(arguments["device"])
    seconds = []
    for turn in range(arguments["repeats"] + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        training_step(model, optimizer, ids_BT)
        if turn > 1:  # the first compiles, the second has the optimizer's moments for the first time
            seconds.append(time.perf_counter() - start)
    return {
        "tokens_per_second": arguments["ctx"] / median(seconds),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "base_mib": base / 2**20,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(json.loads(sys.argv[1]))) + "\n")
