"""Reading prompts: many sequences of different lengths at once, through the parallel op, in bounded memory.

Shapes: R rows (sequences), T tokens of a packed pass, C channels, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.model.state import RWKV7State

CHUNK_TOKENS = 512
"""Tokens of one sequence per pass; where a sequence is cut depends on nothing else in the batch."""
PASS_TOKENS = 2048
"""Tokens of all sequences per pass: bounds the memory of activations, whatever the prompts' lengths."""


def prefill(
    model: RWKV7,
    prompts: Sequence[Sequence[int]],
    state: RWKV7State,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    pass_tokens: int = PASS_TOKENS,
) -> tuple[Tensor, RWKV7State]:
    """Logits after the last token of every prompt [R,V], and the state there; `state` has a row per prompt.

    The head runs on last tokens only. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("every prompt needs at least one token")
    hidden: list[Tensor | None] = [None] * len(prompts)
    states = [state.select([row]) for row in range(len(prompts))]
    for start in range(0, max(map(len, prompts)), chunk_tokens):
        pieces = [ids[start : start + chunk_tokens] for ids in prompts]
        for rows in _passes([len(piece) for piece in pieces], pass_tokens):
            joined = RWKV7State.cat([states[row] for row in rows])
            last_RC, after = _read(model, [pieces[row] for row in rows], joined)
            for index, row in enumerate(rows):
                hidden[row], states[row] = last_RC[index], after.select([index])
    logits_RV = model.head(torch.stack([h for h in hidden if h is not None]))
    return logits_RV, RWKV7State.cat(states)


def _read(model: RWKV7, pieces: Sequence[Sequence[int]], state: RWKV7State) -> tuple[Tensor, RWKV7State]:
    """One packed pass -> (final norm's output at the last token of every piece [R,C], state)."""
    device = model.ln_out.weight.device
    ids_BT = torch.tensor([[token for piece in pieces for token in piece]], device=device)
    lengths = torch.tensor([len(piece) for piece in pieces])
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    h_BTC, after = model.hidden(ids_BT, state=state, cu_seqlens=borders if len(pieces) > 1 else None)
    return h_BTC[0, (borders[1:] - 1).to(device)], after


def _passes(lengths: Sequence[int], pass_tokens: int) -> Iterator[list[int]]:
    """Rows of each pass: neighbours that fit into pass_tokens together, at least one; no empty ones."""
    rows: list[int] = []
    total = 0
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        if rows and total + length > pass_tokens:
            yield rows
            rows, total = [], 0
        rows.append(row)
        total += length
    if rows:
        yield rows
