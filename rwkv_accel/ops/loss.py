"""Cross-entropy of a language-model head, as a sum over target tokens, with L2Wrap.

L2Wrap leaves the loss alone and adds `l2wrap * max_logit` to the gradient of each row's largest logit, which
keeps logits from drifting off. It is part of the gradient like any other: rows without a target get none, and
it is scaled by the incoming gradient, so accumulating micro-batches does not change its weight.

Shapes: R rows (tokens), C channels, V vocab.
Source: RWKV-LM train_temp/src/model.py (L2Wrap).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv_accel.ops.first_order import check_first_order

IGNORE_INDEX = -100
"""Label of a position that is not a target."""


def linear_cross_entropy_sum(
    hidden_RC: Tensor,
    weight_VC: Tensor,
    labels_R: Tensor,
    *,
    target_rows: Tensor | None = None,
    l2wrap: float = 1e-4,
    chunk_rows: int = 512,
) -> Tensor:
    """Sum over target rows of cross_entropy(hidden @ weight^T, label), without ever holding the [R,V] logits.

    Gradients are made in the forward pass, `chunk_rows` rows at a time, and only those that are asked for: a
    frozen weight costs no weight gradient. The backward pass scales them in place, so it can run only once.

    Args:
        hidden_RC: [R,C], any float dtype. Matrix products are in this dtype, softmax in fp32 (or fp64).
        weight_VC: [V,C], dtype of hidden.
        labels_R: int64 [R]; rows with IGNORE_INDEX are skipped, not computed and masked.
        target_rows: int64 positions of the labels that count; None looks for them, which waits for an accelerator.
        l2wrap: weight of L2Wrap, 0 for none; a tie of largest logits goes to the first.
        chunk_rows: rows whose logits exist at the same time; the memory needed is chunk_rows * V values.

    Returns an fp32 (or fp64) scalar, 0 if no row is a target. Raises ValueError for misfitting inputs.
    """
    if weight_VC.dim() != 2 or hidden_RC.dim() != 2 or hidden_RC.shape[1] != weight_VC.shape[1]:
        raise ValueError(
            f"hidden must be [rows, channels] and weight [vocab, channels], got {list(hidden_RC.shape)} and "
            f"{list(weight_VC.shape)}"
        )
    if weight_VC.dtype != hidden_RC.dtype:
        raise ValueError(f"weight must have hidden's dtype {hidden_RC.dtype}, got {weight_VC.dtype}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    _check_labels(labels_R, hidden_RC.shape[0], weight_VC.shape[0])
    rows_R = find_target_rows(labels_R) if target_rows is None else target_rows
    settings = (l2wrap, chunk_rows, torch.is_grad_enabled())
    return _LinearCrossEntropySum.apply(hidden_RC, weight_VC, labels_R, rows_R, settings)


def cross_entropy_sum(
    logits_RV: Tensor, labels_R: Tensor, *, target_rows: Tensor | None = None, l2wrap: float = 1e-4
) -> Tensor:
    """Sum over target rows of cross_entropy(logits, label): the same contract for logits that already exist.

    Args:
        logits_RV: [R,V], any float dtype; softmax and loss are made in fp32 (fp64 for fp64).
        labels_R: int64 [R]; rows with IGNORE_INDEX are skipped.
        target_rows: int64 positions of the labels that count; None looks for them, which waits for an accelerator.
        l2wrap: weight of L2Wrap, 0 for none; a tie of largest logits goes to the first.

    Returns a scalar in fp32 (fp64 for fp64). Raises ValueError for inputs that do not fit.
    """
    if logits_RV.dim() != 2:
        raise ValueError(f"logits must be [rows, vocab], got {list(logits_RV.shape)}")
    _check_labels(labels_R, *logits_RV.shape)
    rows_R = find_target_rows(labels_R) if target_rows is None else target_rows
    return _CrossEntropySum.apply(logits_RV, labels_R, rows_R, l2wrap)


def _check_labels(labels_R: Tensor, num_rows: int, vocab_size: int) -> None:
    if labels_R.shape != (num_rows,) or labels_R.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{num_rows}], got {labels_R.dtype} {list(labels_R.shape)}")
    # An accelerator checks indices on its own; looking at them here would wait for it.
    if labels_R.device.type == "cpu":
        bad = (labels_R != IGNORE_INDEX) & ((labels_R < 0) | (labels_R >= vocab_size))
        if bad.any():
            raise ValueError(
                f"label {int(labels_R[bad][0])} is neither a token id below {vocab_size} nor {IGNORE_INDEX}"
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def find_target_rows(labels_R: Tensor) -> Tensor:
    """int64 positions of the labels that are targets. Waits for the device of the labels."""
    return (labels_R != IGNORE_INDEX).nonzero().squeeze(1)


def _softmax_(logits_RV: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn wide logits into probabilities in place -> (loss, largest logit, its first index) of every row."""
    largest_R, argmax_R = logits_RV.max(dim=1)
    target_R = logits_RV.gather(1, labels_R.unsqueeze(1)).squeeze(1)
    torch.softmax(logits_RV, dim=1, out=logits_RV)
    # The largest probability is at least 1/V, so its logarithm is exact enough for logsumexp.
    log_largest_R = logits_RV.gather(1, argmax_R.unsqueeze(1)).squeeze(1).log_()
    return largest_R - log_largest_R - target_R, largest_R, argmax_R


def _logit_grad_(probs_RV: Tensor, labels_R: Tensor, largest_R: Tensor, argmax_R: Tensor, l2wrap: float) -> None:
    """Turn probabilities into the gradient of the loss sum and L2Wrap, in place."""
    rows_R = torch.arange(len(labels_R), device=labels_R.device)
    probs_RV[rows_R, labels_R] -= 1
    if l2wrap:
        probs_RV[rows_R, argmax_R] += l2wrap * largest_R


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: Tensor,
        weight_VC: Tensor,
        labels_R: Tensor,
        rows_R: Tensor,
        settings: tuple[float, int, bool],
    ) -> Tensor:
        l2wrap, chunk_rows, grad = settings
        need_hidden, need_weight = (grad and need for need in ctx.needs_input_grad[:2])
        dtype, wide = hidden_RC.dtype, _wide(hidden_RC.dtype)
        num_rows, vocab_size = len(rows_R), len(weight_VC)
        chunk_rows = min(chunk_rows, max(num_rows, 1))
        products = hidden_RC.new_empty(chunk_rows, vocab_size)
        wide_logits = products if dtype == wide else hidden_RC.new_empty(chunk_rows, vocab_size, dtype=wide)
        loss_R = hidden_RC.new_empty(num_rows, dtype=wide)
        d_hidden = torch.zeros_like(hidden_RC) if need_hidden else None
        # Summed over chunks in the wide dtype: bf16 would lose all but the first chunks.
        d_weight = torch.zeros_like(weight_VC, dtype=wide) if need_weight else None
        for start in range(0, num_rows, chunk_rows):
            chunk = rows_R[start : start + chunk_rows]
            hidden, labels = hidden_RC.index_select(0, chunk), labels_R.index_select(0, chunk)
            product, logits = products[: len(chunk)], wide_logits[: len(chunk)]
            torch.mm(hidden, weight_VC.t(), out=product)
            if dtype != wide:
                logits.copy_(product)
            loss_R[start : start + len(chunk)], largest, argmax = _softmax_(logits, labels)
            if not (need_hidden or need_weight):
                continue
            _logit_grad_(logits, labels, largest, argmax, l2wrap)
            if dtype != wide:
                product.copy_(logits)
            if d_hidden is not None:
                d_hidden.index_copy_(0, chunk, torch.mm(product, weight_VC))
            if d_weight is not None and dtype == wide:
                d_weight.addmm_(product.t(), hidden)
            elif d_weight is not None:
                d_weight.add_(torch.mm(product.t(), hidden))
        if d_weight is not None:
            d_weight = d_weight.to(dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss_R.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("linear_cross_entropy_sum")
        # In place: a second copy of the weight gradient would double the memory of the largest matrix.
        grads = [None if d is None else d.mul_(grad_output) for d in ctx.saved_tensors]
        return (*grads, None, None, None)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, labels_R: Tensor, rows_R: Tensor, l2wrap: float) -> Tensor:
        probs_RV = logits_RV.index_select(0, rows_R).to(_wide(logits_RV.dtype))
        loss_R, largest_R, argmax_R = _softmax_(probs_RV, labels_R.index_select(0, rows_R))
        ctx.l2wrap = l2wrap
        ctx.save_for_backward(logits_RV, labels_R, rows_R, largest_R, argmax_R)
        return loss_R.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order("cross_entropy_sum")
        logits_RV, labels_R, rows_R, largest_R, argmax_R = ctx.saved_tensors
        grad_RV = logits_RV.index_select(0, rows_R).to(_wide(logits_RV.dtype))
        torch.softmax(grad_RV, dim=1, out=grad_RV)
        _logit_grad_(grad_RV, labels_R.index_select(0, rows_R), largest_R, argmax_R, ctx.l2wrap)
        grad_RV.mul_(grad_output)
        if len(rows_R) == len(labels_R):
            return grad_RV.to(logits_RV.dtype), None, None, None
        return torch.zeros_like(logits_RV).index_copy_(0, rows_R, grad_RV.to(logits_RV.dtype)), None, None, None
