"""Decode and prefill speed against the pip package `rwkv` on the same checkpoint and device, after a parity check.

Candidates take turns in one process, so that a busy machine slows all of them; the best of the rounds counts.
Shapes: R rows, V vocab.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rwkv_accel.bench.harness import Options, Row, device_wait, in_fresh_process
from rwkv_accel.errors import UserError
from rwkv_accel.generation.decode import RecurrentStep
from rwkv_accel.generation.loading import Source, load_generator_model
from rwkv_accel.generation.packed import PackedLinear
from rwkv_accel.generation.prefill import prefill
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.model.layers import Linear
from rwkv_accel.model.rwkv7 import RWKV7

PACKAGE = "rwkv package"
SHAPE = (12, 768, 65536, 64)
PARITY = 1e-3
"""Largest difference of logits, relative to their norm, at which speeds are compared at all."""
PARITY_BF16 = 5e-2
"""The same for bf16 arithmetic, which keeps 8 bits of every product."""


def measure(options: Options) -> list[Row]:
    """Random weights in the shape of the 0.1B model, fp32 on the CPU, bf16 on a GPU; in a process where the package is
    switched on."""
    arguments = {"threads": options.threads, "rounds": options.repeats, "device": options.device}
    found = in_fresh_process(__name__, arguments, variables={"RWKV_V7_ON": "1"})["rows"]
    return [
        Row(
            f"{row['name']}, 0.1B shape",
            row["tokens_per_second"],
            "tokens/s",
            "" if PACKAGE in row["name"] else PACKAGE,
            None if PACKAGE in row["name"] else row["ratio"],
        )
        for row in found
    ]


def decode_rows(
    checkpoint: str | Path,
    *,
    batches: tuple[int, ...] = (1, 8, 64),
    prompt_tokens: int = 256,
    rounds: int = 10,
    device: str = "cpu",
    precision: str | None = None,
) -> list[dict[str, Any]]:
    """One row per case: `name`, `tokens_per_second` over all rows of the batch, `ratio` to the package.

    precision: of both, by default 32-true on a CPU, where bf16-true is measured too, and bf16-true on a GPU.

    The package decodes one row at a time, so its batch-1 speed is the base of every decode ratio. The row of the
    projections alone is a bound: a prefill cannot be faster than its matrix products.

    Raises:
        UserError: the package is not installed or was imported without RWKV_V7_ON=1, or the logits differ.
    """
    precision = precision or ("32-true" if device == "cpu" else "bf16-true")
    load = partial(load_generator_model, Source(Path(checkpoint)), device=device)
    package = _package_model(Path(checkpoint), f"{device} {'bf16' if precision == 'bf16-true' else 'fp32'}")
    model, _ = load(precision=precision)
    alone, _ = load(precision=precision, num_rows=1)
    half = None if precision == "bf16-true" else load(precision="bf16-true")[0]
    recurrent, single = RecurrentStep(model), RecurrentStep(alone)
    vocab_size = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, vocab_size, (prompt_tokens,), generator=generator).tolist()
    with torch.inference_mode():
        _check_parity(model, recurrent, package, prompt[:16], PARITY if half is not None else PARITY_BF16)
        if half is not None:
            _check_parity(half, RecurrentStep(half), package, prompt[:16], PARITY_BF16)
        states = {rows: model.fresh_state(rows) for rows in batches}
        ids = {rows: torch.randint(1, vocab_size, (rows,), generator=generator).to(device) for rows in batches}
        package_state = package.generate_zero_state()
        cases: dict[str, tuple[int, Callable[[], Any]]] = {
            f"decode, {PACKAGE}": (1, lambda: package.forward([1], package_state)),
            f"prefill, {PACKAGE}": (prompt_tokens, lambda: package.forward(list(prompt), None)),
            "prefill": (prompt_tokens, partial(_prefill, model, prompt)),
            "prefill, its projections alone": (prompt_tokens, _projections(model, prompt_tokens)),
        }
        if half is not None:
            run_half = partial(_prefill, half, prompt)
            cases["prefill, bf16-true"] = (prompt_tokens, run_half)
        for rows in batches:
            step = (single if rows == 1 else recurrent).step
            cases[f"decode, batch {rows}"] = (rows, partial(step, ids[rows], states[rows]))
        best = _take_turns({name: run for name, (_, run) in cases.items()}, rounds, device_wait(device))
    speeds = {name: tokens / best[name] for name, (tokens, _) in cases.items()}
    return [
        {"name": name, "tokens_per_second": speed, "ratio": speed / speeds[f"{name.split(',')[0]}, {PACKAGE}"]}
        for name, speed in speeds.items()
    ]


def _prefill(model: RWKV7, prompt: list[int]) -> Any:
    return prefill(model, [prompt], model.fresh_state(1))


def _package_model(checkpoint: Path, strategy: str) -> Any:
    try:
        from rwkv import model as package
    except ImportError:
        raise UserError("the comparison needs the package rwkv; pip install rwkv==0.8.32") from None
    if not hasattr(package, "RWKV_x070"):
        raise UserError("the package rwkv reads its switches at import; start again with RWKV_V7_ON=1 in front")
    if checkpoint.suffix != ".pth":
        raise UserError(f"the package rwkv reads .pth files only, not {checkpoint}; export it first")
    return package.RWKV(model=str(checkpoint.with_suffix("")), strategy=strategy)


def _projections(model: RWKV7, num_tokens: int) -> Callable[[], None]:
    """Runs every projection of the blocks once on num_tokens rows."""
    layers = [module for module in model.blocks.modules() if isinstance(module, PackedLinear | Linear)]
    like = model.ln_out.weight.new_empty(0, dtype=model.compute_dtype)
    sizes = {layer.in_features for layer in layers}
    inputs = {size: torch.randn(num_tokens, size, device=like.device).to(like.dtype) for size in sizes}

    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return run


def _check_parity(model: RWKV7, recurrent: RecurrentStep, package: Any, prompt: list[int], tolerance: float) -> None:
    theirs, their_state = package.forward(list(prompt), None)
    logits_RV, state = prefill(model, [prompt], model.fresh_state(1))
    pairs = [(logits_RV[0], theirs)]
    token = torch.tensor([7], device=theirs.device)
    pairs.append((recurrent.step(token, state)[0][0], package.forward([7], their_state)[0]))
    for ours, want in pairs:
        difference = float((ours.float() - want.float()).norm() / want.float().norm())
        if not difference < tolerance:
            raise UserError(f"logits differ from the package's by {difference:.1e} (relative); speeds mean nothing")


def _take_turns(cases: dict[str, Callable[[], Any]], rounds: int, wait: Callable[[], None]) -> dict[str, float]:
    """Seconds of the fastest call of each; one round before the first is not counted."""
    best = dict.fromkeys(cases, float("inf"))
    for round_index in range(rounds + 1):
        for name, run in cases.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if round_index:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _run(arguments: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(arguments["threads"])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random.pth"
        generate_init_weight(RWKV7Config.for_new_model(*SHAPE), checkpoint, seed=0)
        return {"rows": decode_rows(checkpoint, rounds=arguments["rounds"], device=arguments["device"])}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(json.loads(sys.argv[1]))) + "\n")
