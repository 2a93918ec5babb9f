"""Presence and frequency penalty with decay, as the pip package `rwkv` counts them.

Shapes: V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_accel.generation.params import SamplingParams
from rwkv_accel.generation.sampling import apply_penalty
from rwkv_accel.generation.text import Tokenizer

_UNCOUNTED = " \t0123456789"


class PenaltyCounter:
    """Occurrences in one sequence. The prompt does not count (rwkv/utils.py PIPELINE.generate)."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, vocab_size: int, device: torch.device):
        self._tokenizer, self._params = tokenizer, params
        self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._counts_V = torch.zeros(vocab_size, device=device)

    def apply(self, logits_V: Tensor) -> Tensor:
        """Logits minus the penalties so far."""
        params = self._params
        return apply_penalty(logits_V, self._seen_V, self._counts_V, params.presence_penalty, params.frequency_penalty)

    def count(self, token: int) -> None:
        """Decay all counts, then add the token; spaces and digits are marked as seen but never counted."""
        self._counts_V *= self._params.penalty_decay
        text = self._tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
        self._seen_V[token] = True
        self._counts_V[token] += 0.0 if text in _UNCOUNTED else 1.0
