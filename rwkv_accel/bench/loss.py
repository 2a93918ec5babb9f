"""Loss over a head of 65536 tokens, frozen as in a PEFT run and trained: row chunks against all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_accel.bench.harness import (
    Options,
    Row,
    check_parity,
    device_wait,
    interleaved,
    peak_tensor_mib,
)
from rwkv_accel.ops.loss import linear_cross_entropy_sum

ROWS, CHANNELS, VOCAB, L2WRAP = 2048, 768, 65536, 1e-4
CHUNK_ROWS = (512, 128)
"""The op's default, and one whose logits take 32 MiB."""
TOLERANCE = 1e-4
BASELINE = "all logits"


def measure(options: Options) -> list[Row]:
    rows = []
    for frozen in (True, False):
        label = f"{ROWS} rows, C={CHANNELS}, V={VOCAB}, {'frozen' if frozen else 'trained'} head"
        steps = _candidates(frozen, options.device)
        truth = steps[BASELINE]()
        for name, step in steps.items():
            check_parity(f"{name}, {label}", step(), truth, TOLERANCE)
        del truth
        seconds = interleaved(steps, options.repeats, device_wait(options.device))
        peaks = {name: peak_tensor_mib(step, options.device) for name, step in steps.items()}
        rows += [_row(f"{name}, {label}", name, 1e3, seconds, "ms") for name in steps]
        rows += [_row(f"{name} peak memory, {label}", name, 1.0, peaks, "MiB") for name in steps]
    return rows


def _row(label: str, name: str, scale: float, values: dict[str, float], unit: str) -> Row:
    if name == BASELINE:
        return Row(label, scale * values[name], unit)
    return Row(label, scale * values[name], unit, BASELINE, values[BASELINE] / values[name])


def _candidates(frozen: bool, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of each way: loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden_RC = torch.randn(ROWS, CHANNELS, generator=generator).to(device).requires_grad_()
    weight_VC = (torch.randn(VOCAB, CHANNELS, generator=generator) * CHANNELS**-0.5).to(device)
    weight_VC.requires_grad_(not frozen)
    labels_R = torch.randint(VOCAB, (ROWS,), generator=generator).to(device)

    def all_logits() -> Tensor:
        logits_RV = F.linear(hidden_RC, weight_VC)
        pull = 0.5 * L2WRAP * logits_RV.amax(-1).square().sum()
        return F.cross_entropy(logits_RV, labels_R, reduction="sum") + pull - pull.detach()

    def row_chunks(chunk_rows: int) -> Tensor:
        return linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, l2wrap=L2WRAP, chunk_rows=chunk_rows)

    def step(loss_of: Callable[[], Tensor]) -> list[Tensor]:
        loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden_RC] if frozen else [hidden_RC, weight_VC])]

    ways: dict[str, Callable[[], Tensor]] = {
        BASELINE: all_logits,
        **{f"chunks of {n} rows": partial(row_chunks, n) for n in CHUNK_ROWS},
    }
    return {name: partial(step, loss_of) for name, loss_of in ways.items()}
