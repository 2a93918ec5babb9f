"""WKV-7 token by token: the definition that other backends are held to, and the step of recurrent generation.

Shapes: B batch, T tokens, H heads, N head size, S sequences of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rwkv_accel.ops.wkv7.checks import wide_dtype


def wkv7_reference(
    r: Tensor,
    w_log: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    borders: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """Backend of `wkv7` for checked inputs, but for its decay (decay.py). Gradients come from autograd, which keeps a
    state per token."""
    if borders is None:
        return _recurrence(r, w_log, k, v, a, b, state)
    lengths = [right - left for left, right in pairwise(borders)]
    # split, not slices: the backward of a slice allocates a gradient of the whole row.
    documents = [x.split(lengths, dim=1) for x in (r, w_log, k, v, a, b)]
    states: Sequence[Tensor | None] = [None] * len(lengths) if state is None else state.split(1)
    runs = [_recurrence(*inputs) for inputs in zip(*documents, states)]
    return torch.cat([out for out, _ in runs], dim=1), torch.cat([final for _, final in runs])


def _recurrence(
    r: Tensor, w_log: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, _, heads, size = r.shape
    dtype, wide = v.dtype, wide_dtype(r, w_log, k, v, a, b)
    r, w_log, k, v, a, b = (x.to(wide) for x in (r, w_log, k, v, a, b))
    state_BHNN = r.new_zeros(batch, heads, size, size) if state is None else state.to(wide)
    # Unbound once: autograd of x[:, t] allocates a full-size gradient per token.
    columns = [x.unsqueeze(-1).unbind(1) for x in (r, a, v)]
    rows = [x.unsqueeze(-2).unbind(1) for x in (w_log.exp(), b, k)]
    outs = []
    for r_t, a_t, v_t, decay_t, b_t, k_t in zip(*columns, *rows):
        state_BHNN = state_BHNN * decay_t + (state_BHNN @ a_t) @ b_t + v_t @ k_t
        outs.append(state_BHNN @ r_t)
    return torch.stack(outs, 1).squeeze(-1).to(dtype), state_BHNN
