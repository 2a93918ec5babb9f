"""Which chunks of which sequences the programs of the Triton kernels work on.

A sequence is cut into chunks of C tokens, its last one filled up by masks. One program walks along a piece, a run of
chunks; a piece is a whole sequence unless there are too few of them for the device.

Shapes: B batch, T tokens, H heads, N head size, C tokens per chunk, S sequences, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rwkv_accel.ops.devices import to_device

WANTED_PROGRAMS = 512
"""Programs of a scan that fill a large GPU (132 multiprocessors, several programs each). One number for all devices:
where a sequence is cut decides how its sums are rounded, and ranks and machines should agree on that."""
LEAST_CHUNKS = 16
"""Shortest piece worth its own start: cutting costs every piece a scan without outputs."""


@dataclass(frozen=True)
class Pieces:
    """Tables of the kernels, on the device (int64)."""

    pieces_P3: Tensor
    """First token (row of [B*T]), number of tokens, first chunk."""
    chunks_n2: Tensor
    """First token, number of tokens."""
    spans_S2: Tensor
    """First piece of every sequence, and their number."""
    last_S: Tensor
    """Last piece of every sequence."""

    @property
    def num_pieces(self) -> int:
        return len(self.pieces_P3)

    @property
    def num_chunks(self) -> int:
        return len(self.chunks_n2)

    @property
    def num_sequences(self) -> int:
        return len(self.last_S)

    @property
    def is_cut(self) -> bool:
        return self.num_pieces > self.num_sequences


def piece_length(num_chunks: int, num_sequences: int, programs_per_piece: int) -> int:
    """Most chunks of a piece: all of them where the sequences alone make enough programs."""
    if num_sequences * programs_per_piece >= WANTED_PROGRAMS // 2:
        return num_chunks
    wanted_pieces = max(1, WANTED_PROGRAMS // programs_per_piece)
    return max(LEAST_CHUNKS, -(-num_chunks // wanted_pieces))


@lru_cache(maxsize=32)
def build_pieces(
    batch: int,
    num_tokens: int,
    borders: tuple[int, ...] | None,
    chunk_size: int,
    programs_per_piece: int,
    device: torch.device,
) -> Pieces:
    """Tables of a batch [B,T], or of the documents between `borders` (B = 1)."""
    if borders is None:
        borders = tuple(range(0, batch * num_tokens + 1, num_tokens))
    edges = torch.tensor(borders)
    lengths = edges.diff()
    counts = (lengths + chunk_size - 1).div(chunk_size, rounding_mode="floor")
    most = piece_length(int(counts.sum()), len(lengths), programs_per_piece)

    pieces_of = (counts + most - 1).div(most, rounding_mode="floor")
    starts, within = _enumerate(pieces_of)
    sequence = torch.repeat_interleave(pieces_of)
    # Pieces of a sequence have nearly equal lengths: the longest decides when the scan ends.
    low = within * counts[sequence] // pieces_of[sequence]
    high = (within + 1) * counts[sequence] // pieces_of[sequence]
    tokens = torch.minimum(high * chunk_size, lengths[sequence]) - low * chunk_size
    first_chunk_of, chunk_within = _enumerate(counts)
    pieces = torch.stack([edges[sequence] + low * chunk_size, tokens, first_chunk_of[sequence] + low], dim=1)

    sequence = torch.repeat_interleave(counts)
    first = chunk_within * chunk_size
    chunks = torch.stack([edges[sequence] + first, (lengths[sequence] - first).clamp(max=chunk_size)], dim=1)
    spans = torch.stack([starts, pieces_of], dim=1)
    return Pieces(*(to_device(x, device) for x in (pieces, chunks, spans, starts + pieces_of - 1)))


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first item of every group, and the position of every item in its group."""
    starts = counts.cumsum(0) - counts
    return starts, torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)
