"""Output head that turns hidden rows into a loss without ever holding all logits, whatever layer it is.

The loss is made inside the head's own forward, once per forward pass: sharding engines gather a layer's weights
for exactly that call, and their gradient hooks must fire once per parameter.

Shapes: R rows (tokens), C channels, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_accel.model.layers import Linear
from rwkv_accel.model.precision import wide_dtype
from rwkv_accel.ops.loss import cross_entropy_sum, find_target_rows, linear_cross_entropy_sum


class LMHead(Linear):
    """Output projection; with labels it returns the loss sum instead of logits."""

    def forward(
        self,
        h: Tensor,
        labels_R: Tensor | None = None,
        target_rows: Tensor | None = None,
        *,
        l2wrap: float = 0.0,
        chunk_rows: int = 512,
    ) -> Tensor:
        """h [..., C] -> logits [..., V]; with labels_R, h is [R,C] and the result is the wide loss sum."""
        if labels_R is None:
            return super().forward(h)
        weight_VC = self.weight.to(h.dtype)
        return linear_cross_entropy_sum(
            h, weight_VC, labels_R, target_rows=target_rows, l2wrap=l2wrap, chunk_rows=chunk_rows
        )


class LossHead(nn.Module):
    """The same contract for any other layer in the head's place (an adapter, a quantised weight)."""

    def forward(
        self,
        h: Tensor,
        labels_R: Tensor | None = None,
        target_rows: Tensor | None = None,
        *,
        l2wrap: float = 0.0,
        chunk_rows: int = 512,
    ) -> Tensor:
        """h [..., C] -> logits [..., V]; with labels_R, h is [R,C] and the result is the wide loss sum."""
        if labels_R is None:
            return super().forward(h)
        trained = [param for param in self.parameters() if param.requires_grad]
        settings = (l2wrap, chunk_rows, torch.is_grad_enabled())
        rows_R = find_target_rows(labels_R) if target_rows is None else target_rows
        return _ChunkedLossSum.apply(super().forward, h, labels_R, rows_R, settings, *trained)


def as_head(layer: nn.Module) -> nn.Module:
    """The same layer object, able to take labels as `LMHead` does; its other methods stay its own."""
    if not isinstance(layer, (LMHead, LossHead)):
        layer.__class__ = _with_loss(layer.__class__)
    return layer


@cache
def _with_loss(layer_class: type) -> type:
    return type(f"{layer_class.__name__}Head", (LossHead, layer_class), {})


class _ChunkedLossSum(torch.autograd.Function):
    """Loss sum of target rows; gradients of the input and of all trained parameters are made in the forward pass,
    chunk by chunk, so that logits of one chunk exist at a time and none are made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        h_RC: Tensor,
        labels_R: Tensor,
        rows_R: Tensor,
        settings: tuple[float, int, bool],
        *trained: nn.Parameter,
    ) -> Tensor:
        l2wrap, chunk_rows, grad = settings
        wide = wide_dtype(h_RC.dtype)
        need_h = grad and ctx.needs_input_grad[1]
        d_h_RC = torch.zeros_like(h_RC) if need_h else None
        # Summed wide: bf16 would lose all but the first chunks.
        d_trained = [torch.zeros_like(param, dtype=wide) for param in trained] if grad else []
        loss = h_RC.new_zeros((), dtype=wide)
        for chunk in rows_R.split(chunk_rows) if len(rows_R) else ():
            with torch.set_grad_enabled(bool(need_h or d_trained)):
                h_chunk = h_RC.index_select(0, chunk).requires_grad_(need_h)
                every = torch.arange(len(chunk), device=chunk.device)
                chunk_loss = cross_entropy_sum(
                    logits_of(h_chunk), labels_R.index_select(0, chunk), target_rows=every, l2wrap=l2wrap
                )
            loss += chunk_loss.detach()
            if not chunk_loss.requires_grad:
                continue
            inputs = ([h_chunk] if need_h else []) + (list(trained) if d_trained else [])
            grads = list(torch.autograd.grad(chunk_loss, inputs))
            if d_h_RC is not None:
                d_h_RC.index_copy_(0, chunk, grads.pop(0))
            for total, part in zip(d_trained, grads):
                total += part
        ctx.save_for_backward(d_h_RC, *(d.to(param.dtype) for d, param in zip(d_trained, trained)))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        d_h_RC, *d_trained = (None if d is None else d * grad_output for d in ctx.saved_tensors)
        return (None, d_h_RC, None, None, None, *d_trained)
