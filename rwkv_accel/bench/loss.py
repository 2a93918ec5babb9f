"""Loss over a head of 65536 tokens, frozen as in a PEFT run and trained: row chunks against all logits at once.

The baseline is what RWKV's trainers compute: cross-entropy on all logits, and L2Wrap, which adds a second gradient of
their size. The floor is the matrix products alone, without which no loss can be made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
CHUNK_ROWS = (512, 256)
"""The op's default, and one whose logits take 64 MiB."""
TOLERANCE = 1e-4
BASELINE = "all logits"
FLOOR = "matrix products alone"


def measure(options: Options) -> list[Row]:
    rows = []
    for frozen in (True, False):
        label = f"{ROWS} rows, C={CHANNELS}, V={VOCAB}, {'frozen' if frozen else 'trained'} head"
        steps = _candidates(frozen, options.device)
        floor = steps.pop(FLOOR)
        truth = steps[BASELINE]()
        for name, step in steps.items():
            check_parity(f"{name}, {label}", step(), truth, TOLERANCE)
        del truth
        seconds = interleaved({**steps, FLOOR: floor}, options.repeats, device_wait(options.device))
        peaks = {name: peak_tensor_mib(step, options.device) for name, step in steps.items()}
        rows += [_row(f"{name}, {label}", name, 1e3, seconds, "ms") for name in (*steps, FLOOR)]
        rows += [_row(f"{name} peak memory, {label}", name, 1.0, peaks, "MiB") for name in steps]
    return rows


def _row(label: str, name: str, scale: float, values: dict[str, float], unit: str) -> Row:
    if name == BASELINE:
        return Row(label, scale * values[name], unit)
    return Row(label, scale * values[name], unit, BASELINE, values[BASELINE] / values[name])


class _SecondGradient(torch.autograd.Function):
    """L2Wrap as a gradient of its own: zeros but for the largest logit of each row."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits_RV: Tensor) -> Tensor:
        ctx.save_for_backward(logits_RV)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (logits_RV,) = ctx.saved_tensors
        largest_R1, index_R1 = logits_RV.max(-1, keepdim=True)
        return grad, torch.zeros_like(logits_RV).scatter_(-1, index_R1, largest_R1 * (L2WRAP * grad))


def _candidates(frozen: bool, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of each way: loss and gradients; and the floor, which gives nothing useful."""
    generator = torch.Generator().manual_seed(0)
    hidden_RC = torch.randn(ROWS, CHANNELS, generator=generator).to(device).requires_grad_()
    weight_VC = (torch.randn(VOCAB, CHANNELS, generator=generator) * CHANNELS**-0.5).to(device)
    weight_VC.requires_grad_(not frozen)
    labels_R = torch.randint(VOCAB, (ROWS,), generator=generator).to(device)

    def all_logits() -> Tensor:
        logits_RV = F.linear(hidden_RC, weight_VC)
        return _SecondGradient.apply(F.cross_entropy(logits_RV, labels_R, reduction="sum"), logits_RV)

    def row_chunks(chunk_rows: int) -> Tensor:
        return linear_cross_entropy_sum(hidden_RC, weight_VC, labels_R, l2wrap=L2WRAP, chunk_rows=chunk_rows)

    def products() -> list[Tensor]:
        hidden, weight = hidden_RC.detach(), weight_VC.detach()
        logits = hidden.new_empty(CHUNK_ROWS[0], VOCAB)
        results = []
        for chunk in hidden.split(CHUNK_ROWS[0]):
            torch.mm(chunk, weight.t(), out=logits)
            results.append(torch.mm(logits, weight))
            if not frozen:
                results.append(torch.mm(logits.t(), chunk))
        return results

    def step(loss_of: Callable[[], Tensor]) -> list[Tensor]:
        loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden_RC] if frozen else [hidden_RC, weight_VC])]

    ways: dict[str, Callable[[], Tensor]] = {
        BASELINE: all_logits,
        **{f"chunks of {n} rows": partial(row_chunks, n) for n in CHUNK_ROWS},
    }
    return {FLOOR: products, **{name: partial(step, loss_of) for name, loss_of in ways.items()}}
