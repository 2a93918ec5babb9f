"""Forward and backward of every adapter layer against the plain frozen linear, and against HF peft's layer.

All candidates take turns in one run, so that a busy machine slows all of them; the best of the rounds counts.
Shapes: T rows, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_accel.bench.harness import Options, Row
from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.plan import METHODS
from rwkv_accel.peft.quant import Quant

ALPHA = 2
BASES = {"fp32": None, "nf4": Quant("nf4"), "int8": Quant("int8")}


def measure(options: Options) -> list[Row]:
    """Cost of each layer over the plain frozen linear, and against HF peft's layer of the method."""
    rows = layer_rows(rounds=options.repeats, device=options.device)
    theirs = {row["name"].split(",")[0]: row["ms"] for row in rows if "HF peft" in row["name"]}
    found = []
    for row in rows:
        method, _, base = row["name"].partition(", ")
        note = f"{row['ratio']:.2f}x the time of nn.Linear"
        against = base == "fp32" and method in theirs
        ratio = theirs[method] / row["ms"] if against else None
        found.append(
            Row(f"{row['name']}, C=2048 r=32 T=1024", row["ms"], "ms", "HF peft" if against else "", ratio, note)
        )
    return found


def layer_rows(
    *, channels: int = 2048, rank: int = 32, tokens: int = 1024, rounds: int = 10, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row per layer: `name`, `ms` for forward and backward of [T, C], `ratio` to the plain frozen linear."""
    candidates = _candidates(channels, rank, device)
    x_TC = torch.randn(tokens, channels, device=device, requires_grad=True)
    upstream_TC = torch.randn(tokens, channels, device=device)
    best = dict.fromkeys(candidates, float("inf"))
    for round_index in range(rounds + 1):
        for name, layer in candidates.items():
            seconds = _timed(layer, x_TC, upstream_TC)
            if round_index:  # the first round warms up
                best[name] = min(best[name], seconds)
    plain = best["nn.Linear, frozen"]
    return [{"name": name, "ms": 1e3 * seconds, "ratio": seconds / plain} for name, seconds in best.items()]


def _candidates(channels: int, rank: int, device: str) -> dict[str, nn.Module]:
    weight_OI = torch.randn(channels, channels) * channels**-0.5
    plain = nn.Linear(channels, channels, bias=False).requires_grad_(False)
    plain.weight.copy_(weight_OI)
    found: dict[str, nn.Module] = {"nn.Linear, frozen": plain}
    for base, quant in BASES.items():
        for method, layer_class in METHODS.items():
            # Randomised SVD: how A and B start is not what is measured.
            spec = AdapterSpec(rank, None if method == "miss" else ALPHA * rank, svd_niter=1)
            layer = layer_class(channels, channels, spec, quant)
            layer.set_up(weight_OI, torch.float32, torch.float32, 0, method)
            found[f"{method}, {base}"] = layer
    for method, make in _hf_layers(rank).items():
        found[f"{method}, fp32, HF peft"] = make(weight_OI)
    return {name: layer.to(device) for name, layer in found.items()}


def _hf_layers(rank: int) -> dict[str, Callable[[Tensor], nn.Module]]:
    """HF peft's layers of the same methods; none where it is not installed."""
    try:
        import peft as hf
    except ImportError:
        return {}

    def wrapped(weight_OI: Tensor, config: Any) -> nn.Module:
        model = nn.ModuleDict({"key": nn.Linear(*reversed(weight_OI.shape), bias=False)})
        model["key"].weight.data = weight_OI.clone()
        config.target_modules = ["key"]
        return hf.get_peft_model(model, config).base_model.model["key"]

    alpha = ALPHA * rank
    return {
        "lora": lambda weight: wrapped(weight, hf.LoraConfig(r=rank, lora_alpha=alpha)),
        "dora": lambda weight: wrapped(weight, hf.LoraConfig(r=rank, lora_alpha=alpha, use_dora=True)),
        "miss": lambda weight: wrapped(weight, hf.MissConfig(r=rank)),
    }


def _timed(layer: nn.Module, x_TC: Tensor, upstream_TC: Tensor) -> float:
    layer.zero_grad(set_to_none=True)
    x_TC.grad = None
    _wait(x_TC)
    start = time.perf_counter()
    layer(x_TC).backward(upstream_TC)
    _wait(x_TC)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
