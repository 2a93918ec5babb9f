"""Gradient checkpointing: keep the inputs of a block, or of a part of it, and run it again in the backward pass.

Shapes: B batch, T tokens, C channels, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LayerState = tuple[Tensor, Tensor, Tensor]
"""(att_shift [B,C], wkv [B,H,N,N], ffn_shift [B,C]) of one layer."""


def run_block(
    block: nn.Module, x_BTC: Tensor, v_first_BTC: Tensor | None, state: LayerState | None, *settings: object
) -> tuple[Tensor, ...]:
    """block(x, v_first, state, *settings) with the same outputs and gradients, in the memory of its inputs.

    A block that nothing is differentiated through is run plainly. Dropout draws the same mask both times.

    The reentrant form of torch's checkpoint is taken on purpose: DeepSpeed ZeRO-3 frees a weight at the end of the
    recomputed forward, and the non-reentrant form then stops with a CheckpointError or an empty gradient buffer
    (deepspeed 0.19.8). Its two weaknesses are met here: a graph that starts inside the block gets an anchor, and a
    state travels as separate arguments, so that its gradient is carried too.
    """

    def again(x: Tensor, v_first: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return block(x, v_first, tensors or None, *settings)

    return run_again(again, block.parameters(), x_BTC, v_first_BTC, *(state or ()), is_random=True)


def run_again(
    function: Callable[..., tuple[Tensor, ...]],
    params: Iterable[Tensor],
    *inputs: Tensor | None,
    is_random: bool = False,
) -> tuple[Tensor, ...]:
    """function(*inputs), of which nothing but the inputs is kept; params are what it reads beside them.

    is_random: it draws random numbers, and must draw the same ones both times.
    """
    trains = any(t is not None and t.requires_grad for t in (*inputs, *params))
    if not (trains and torch.is_grad_enabled()):
        return function(*inputs)
    run: Callable[..., tuple[Tensor, ...]] = checkpoint
    if torch.compiler.is_compiling():
        # The compiler knows this form alone. What the other is needed for, ZeRO-3, is not compiled.
        return run(function, *inputs, use_reentrant=False, preserve_rng_state=is_random)

    def again(_anchor: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return function(*tensors)

    # Without an input that needs a gradient, the reentrant form would cut off the parameters.
    anchor = torch.empty(0, requires_grad=True)
    return run(again, anchor, *inputs, use_reentrant=True, preserve_rng_state=is_random)
