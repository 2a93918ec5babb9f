"""Standalone sampling functions, from logits to one token per row.

Shapes: R rows (sequences), V vocab. Every function returns a new tensor. Two orders exist: RWKV's (package
`rwkv`, rwkv/utils.py) cuts the tail first and applies the temperature to what is left, HF's (transformers
generation/logits_process.py) applies the temperature first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_accel.errors import UserError
from rwkv_accel.generation.params import SamplingParams

_CANDIDATES = 256
"""Tokens looked at before the whole vocabulary is sorted: a nucleus rarely holds more."""


def apply_temperature(logits_RV: Tensor, temperature: float) -> Tensor:
    """logits / temperature. Raises UserError unless temperature > 0."""
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}; None asks for the likeliest token")
    return logits_RV / temperature


def top_k_keep(scores_RV: Tensor, top_k: int) -> Tensor:
    """Mask [R,V] of exactly the k highest scores of each row (logits or probabilities); 0 keeps all."""
    keep_RV = torch.ones_like(scores_RV, dtype=torch.bool)
    if 0 < top_k < scores_RV.shape[-1]:
        keep_RV = torch.zeros_like(keep_RV).scatter_(-1, scores_RV.topk(top_k, dim=-1).indices, True)
    return keep_RV


def top_p_keep(probs_RV: Tensor, top_p: float) -> Tensor:
    """Mask [R,V] of the nucleus: all probabilities >= the one at which the descending sum reaches top_p.

    Tokens tied with the last one stay (RWKV's rule). `probs_RV` must sum to 1 per row.
    """
    if top_p >= 1:
        # Rounding may keep the sum below 1; the pip package then falls back to the single likeliest token.
        return torch.ones_like(probs_RV, dtype=torch.bool)
    num_tokens = probs_RV.shape[-1]
    descending = probs_RV.topk(min(_CANDIDATES, num_tokens), dim=-1).values
    if num_tokens > _CANDIDATES and not bool((descending.sum(-1) >= top_p).all()):
        descending = probs_RV.sort(dim=-1, descending=True).values
    reached = descending.double().cumsum(-1) >= top_p
    reached[:, -1] = True
    first = reached.to(torch.uint8).argmax(-1, keepdim=True)
    return probs_RV >= descending.gather(-1, first)


def min_p_keep(probs_RV: Tensor, min_p: float) -> Tensor:
    """Mask [R,V] of the tokens with at least min_p times the row's highest probability (arXiv 2407.01082)."""
    return probs_RV >= min_p * probs_RV.amax(-1, keepdim=True)


def apply_penalty(
    logits_RV: Tensor, seen_RV: Tensor, counts_RV: Tensor, presence_penalty: float, frequency_penalty: float
) -> Tensor:
    """logits - presence * seen - frequency * count (rwkv/utils.py; counts are decayed occurrences)."""
    return logits_RV - presence_penalty * seen_RV.to(logits_RV.dtype) - frequency_penalty * counts_RV


def rwkv_probabilities(
    logits_RV: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Distribution [R,V] in RWKV's order: softmax, top_p, top_k, min_p, p^(1/temperature), normalised."""
    probs_RV = logits_RV.float().softmax(-1) if logits_RV.dtype != torch.float64 else logits_RV.softmax(-1)
    keep_RV = top_p_keep(probs_RV, top_p) if top_p < 1 else None
    if top_k:
        keep_RV = _both(keep_RV, top_k_keep(probs_RV, top_k))
    if min_p:
        keep_RV = _both(keep_RV, min_p_keep(probs_RV, min_p))
    if temperature != 1.0:
        # In logarithms: p^(1/T) of the whole row underflows for small T.
        logits_RV = apply_temperature(probs_RV.log(), temperature)
        probs_RV = _masked(logits_RV, keep_RV).softmax(-1)
    elif keep_RV is not None:
        probs_RV = probs_RV * keep_RV
        probs_RV = probs_RV / probs_RV.sum(-1, keepdim=True)
    return probs_RV


def hf_probabilities(
    logits_RV: Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> Tensor:
    """Distribution [R,V] in HF's order: temperature, top_k, then top_p and min_p of what is left."""
    logits_RV = apply_temperature(logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float(), temperature)
    if top_k:
        logits_RV = _masked(logits_RV, top_k_keep(logits_RV, top_k))
    if top_p < 1:
        logits_RV = _masked(logits_RV, top_p_keep(logits_RV.softmax(-1), top_p))
    if min_p:
        logits_RV = _masked(logits_RV, min_p_keep(logits_RV.softmax(-1), min_p))
    return logits_RV.softmax(-1)


def probabilities(logits_RV: Tensor, params: SamplingParams) -> Tensor:
    """Distribution [R,V] that `params` samples from; without a temperature all mass is on the likeliest token."""
    if params.temperature is None:
        return torch.zeros_like(logits_RV).scatter_(-1, logits_RV.argmax(-1, keepdim=True), 1.0)
    function = rwkv_probabilities if params.order == "rwkv" else hf_probabilities
    return function(
        logits_RV, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p
    )


def draw(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """One id per row by inversion: the first whose cumulative probability exceeds uniform in [0, 1) -> [R].

    In the order of the ids, so that rounding (another batch size, another device) moves borders by 1e-7 and
    never reorders tokens.
    """
    cumulative_RV = probs_RV.double().cumsum(-1)
    target_R1 = uniform_R.to(cumulative_RV).unsqueeze(-1) * cumulative_RV[:, -1:]
    ids_R = torch.searchsorted(cumulative_RV, target_R1, right=True).squeeze(-1)
    # At the very top of [0, 1) the product may round up to the total: take the last id that has mass.
    last_R = torch.searchsorted(cumulative_RV, cumulative_RV[:, -1:].contiguous()).squeeze(-1)
    return torch.minimum(ids_R, last_R)


def _both(keep_RV: Tensor | None, other_RV: Tensor) -> Tensor:
    return other_RV if keep_RV is None else keep_RV & other_RV


def _masked(logits_RV: Tensor, keep_RV: Tensor | None) -> Tensor:
    return logits_RV if keep_RV is None else logits_RV.masked_fill(~keep_RV, -torch.inf)
