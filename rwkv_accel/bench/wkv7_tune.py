"""Sizes of the Triton kernels, measured on this GPU and kept in a file that training reads.

One size after the other is changed while the rest stays, and kept if the whole forward and backward pass gets faster:
the kernels do not influence each other but for the chunk they share. Nothing is ever tuned while training. Some hundred
configurations are compiled, which takes a while: what has been found is in the file at any moment.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rwkv_accel.bench.harness import Options, ParityError, Row, check_parity, device_wait, interleaved
from rwkv_accel.bench.wkv7_gpu import inputs
from rwkv_accel.ops.wkv7 import triton_op
from rwkv_accel.ops.wkv7.pieces import build_pieces
from rwkv_accel.ops.wkv7.triton_config import (
    LAUNCHES,
    Config,
    Launch,
    choose_config,
    config_to_dict,
    default_config,
    entry_name,
    family,
    precision,
    tuned_path,
)

logger = logging.getLogger(__name__)

SHAPE = (8, 4096, 32, 64)
DTYPES = (torch.bfloat16, torch.float32)
LEAST_GAIN = 1.02
"""A size is changed for this much speed; less is noise."""


def changes(config: Config, head_size: int) -> Iterator[dict[str, Any]]:
    """What may be changed about a configuration: the chunk, or how one kernel is launched."""
    for chunk_size in (16, 32):
        yield {"chunk_size": chunk_size}
    for name in LAUNCHES:
        blocks = [head_size] if name == "invert" else [b for b in (16, 32, 64, 128) if b <= head_size]
        for block in blocks:
            for warps in (1, 2, 4, 8):
                for stages in (1, 2):
                    yield {name: Launch(block, warps, stages)}


def search(
    start: Config,
    head_size: int,
    seconds: Callable[[Config, Config], tuple[float, float]],
    keep: Callable[[Config], None] = lambda config: None,
) -> Config:
    """Descend from `start` until no change helps. `seconds(best, other)` times two configurations in turn (infinite
    where one cannot run); `keep` is given every one that is better than all before."""
    best, before = start, None
    while best != before:
        before = best
        for change in changes(best, head_size):
            other = replace(best, **change)
            if other != best:
                ours, theirs = seconds(best, other)
                if ours / theirs > LEAST_GAIN:
                    best = other
                    keep(best)
    return best


def tune(options: Options) -> list[Row]:
    """Measure, write the file of this device, and say what it gained."""
    import triton

    name = torch.cuda.get_device_name()
    found: dict[str, object] = {}
    rows = []
    for dtype in DTYPES:
        size = SHAPE[-1]
        start = default_config(family(torch.device(options.device)), dtype, size)
        want = run(start, dtype, options.device)()

        def seconds(
            best: Config, other: Config, dtype: torch.dtype = dtype, want: list[torch.Tensor] = want
        ) -> tuple[float, float]:
            try:
                check_parity("tuned", run(other, dtype, options.device)(), want, 2e-2)
            except torch.AcceleratorError:
                raise  # nothing runs on the device after it
            except (triton.TritonError, RuntimeError, ParityError) as error:
                # Registers or shared memory do not suffice, or a compiler gives up on it, or gets it wrong.
                logger.warning("left out: %s: %s", other, " ".join(str(error).split())[:200])
                return 1.0, float("inf")
            pair = {"best": run(best, dtype, options.device), "other": run(other, dtype, options.device)}
            measured = interleaved(pair, options.repeats, device_wait(options.device))
            return measured["best"], measured["other"]

        def keep(best: Config, entry: str = entry_name(dtype, size)) -> None:
            found[entry] = config_to_dict(best)
            _write(tuned_path(name), found)

        best = search(start, size, seconds, keep)
        keep(best)
        before, after = seconds(start, best)
        rows.append(Row(f"tuned, {entry_name(dtype, size)}", 1e3 * after, "ms", "the table's sizes", before / after))
    # What this process has read before is out of date.
    choose_config.cache_clear()
    return rows


def _write(path: Path, found: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def run(config: Config, dtype: torch.dtype, device: str) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward with a configuration -> output, final state, gradients."""
    tensors = [t.detach() for t in inputs(SHAPE, dtype, device)]
    batch, num_tokens, heads, size = SHAPE
    programs = heads * (size // config.scan.block)
    pieces = build_pieces(batch, num_tokens, None, config.chunk_size, programs, tensors[0].device)
    setup = triton_op.Setup(config, precision(family(tensors[0].device), dtype, size), pieces)

    def once() -> list[torch.Tensor]:
        out, final, extra = triton_op.run_forward(tensors, None, setup, True)
        return [out, final, *triton_op.run_backward(tensors, out, None, extra, setup)[:7]]

    return once
