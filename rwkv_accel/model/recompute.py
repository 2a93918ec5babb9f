"""Gradient checkpointing: keep the inputs of a block, or of a part of it, and run it again in the backward pass.

Shapes: B batch, T tokens, C channels, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_accel.model.offload import Offload

LayerState = tuple[Tensor, Tensor, Tensor]
"""(att_shift [B,C], wkv [B,H,N,N], ffn_shift [B,C]) of one layer."""


def run_block(
    block: nn.Module,
    x_BTC: Tensor,
    v_first_BTC: Tensor | None,
    state: LayerState | None,
    *settings: object,
    offload: Offload | None = None,
) -> tuple[Tensor, ...]:
    """block(x, v_first, state, *settings) with the same outputs and gradients, in the memory of its inputs.

    offload: x is kept on the host. v_first, one tensor for all blocks, stays where it is.

    A block that nothing is differentiated through is run plainly. Dropout draws the same mask both times.

    The reentrant form of torch's checkpoint is taken on purpose: DeepSpeed ZeRO-3 frees a weight at the end of the
    recomputed forward, and the non-reentrant form then stops with a CheckpointError or an empty gradient buffer
    (deepspeed 0.19.8). Its two weaknesses are met here: a graph that starts inside the block gets an anchor, and a
    state travels as separate arguments, so that its gradient is carried too.
    """

    def again(x: Tensor, v_first: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return block(x, v_first, tensors or None, *settings)

    keeping = nullcontext() if offload is None else offload.instead_of(x_BTC)
    inputs = (x_BTC, v_first_BTC, *(state or ()))
    return run_again(again, block.parameters(), *inputs, is_random=True, keeping=keeping)


def run_again(
    function: Callable[..., tuple[Tensor, ...]],
    params: Iterable[Tensor],
    *inputs: Tensor | None,
    is_random: bool = False,
    keeping: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, ...]:
    """function(*inputs), of which nothing but the inputs is kept; params are what it reads beside them.

    is_random: it draws random numbers, and must draw the same ones both times. keeping: context in which autograd takes
    the inputs into its keeping.
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
    with keeping or nullcontext():
        return run(again, anchor, *inputs, use_reentrant=True, preserve_rng_state=is_random)
