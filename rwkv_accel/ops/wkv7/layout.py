"""How sequences of any length are cut into chunks, and in which order and groups the chunks are worked on.

Chunks are numbered in rounds: the first chunk of every sequence, then the second of every sequence that has one,
and so on. Sequences are ranked by falling number of chunks, so those of a round are the first of the round before,
and one step of the state pass is one batched matrix product on contiguous memory, whatever the lengths are.

Shapes: B batch, T tokens, H heads, N head size, C tokens per chunk, S sequences, Z matrices of a segment (its
chunks times H).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

CHUNK_COST = {32: 1.0, 16: 1.07}
"""Tokens per chunk -> relative time per token, padding included (measured on a CPU)."""
SEGMENT_BYTES = {"cpu": 512 * 1024}
"""Device type -> size of one [Z,C,N] intermediate. About 25 of them live at once; a CPU's cache holds them."""
DEFAULT_SEGMENT_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Piece:
    """Chunks of one round, of sequences of consecutive rank."""

    chunks: slice
    ranks: slice
    start_states: slice
    """Rows of the states before the chunks."""


@dataclass(frozen=True)
class Segment:
    """Consecutive chunks that are worked on together.

    A segment of a regular grid (equal sequences of whole chunks) is addressed by slices of rounds and of sequences,
    any other by the token in each place of its chunks.
    """

    pieces: tuple[Piece, ...]
    grid: tuple[slice, slice] | None
    tokens: Tensor
    """[chunks * C] row of [B*T] in each place (any row where there is no token)."""
    used: Tensor | None
    """Places that hold a token; None if all do."""
    padding: Tensor | None
    """The other places."""

    @property
    def chunks(self) -> slice:
        return slice(self.pieces[0].chunks.start, self.pieces[-1].chunks.stop)

    @property
    def num_chunks(self) -> int:
        return self.chunks.stop - self.chunks.start

    def piece_sizes(self, heads: int) -> list[int]:
        """Number of each piece's matrices among the Z of the segment."""
        return [(piece.chunks.stop - piece.chunks.start) * heads for piece in self.pieces]

    def start_states(self, states_SHNN: Tensor) -> Tensor:
        """[Z,N,N] states before the chunks; a view where no sequence ends within the segment."""
        first, stop = self.pieces[0].start_states.start, self.pieces[-1].start_states.stop
        if stop - first == self.num_chunks:
            return states_SHNN[first:stop].flatten(0, 1)
        return torch.cat([states_SHNN[piece.start_states] for piece in self.pieces]).flatten(0, 1)


@dataclass(frozen=True)
class Layout:
    """Chunks of a batch. Its states are rows of one tensor: S initial ones, then the state behind every chunk."""

    chunk_size: int
    num_sequences: int
    num_chunks: int
    segments: tuple[Segment, ...]
    ranked: Tensor
    """[S] sequence of each rank."""
    rank: Tensor
    """[S] rank of each sequence."""
    final_state: Tensor
    """[S] row of the last state of each sequence."""

    def end_states(self, states_SHNN: Tensor, segment: Segment) -> Tensor:
        """[Z,N,N] view of the states behind the chunks of a segment."""
        first, chunks = self.num_sequences, segment.chunks
        return states_SHNN[first + chunks.start : first + chunks.stop].flatten(0, 1)

    def load(self, x_BTHN: Tensor, segment: Segment, out_ZCN: Tensor) -> None:
        """Copy a segment's tokens into `out`, zeros behind the end of a sequence."""
        heads, size = x_BTHN.shape[2:]
        if segment.grid is not None:
            x = self._grid(x_BTHN, segment.grid)
        else:
            x = x_BTHN.reshape(-1, heads, size).index_select(0, segment.tokens)
            if segment.padding is not None:
                x.index_fill_(0, segment.padding, 0)
            x = x.view(-1, 1, self.chunk_size, heads, size).transpose(2, 3)
        out_ZCN.view(x.shape).copy_(x)

    def store(self, x_ZCN: Tensor, segment: Segment, out_BTHN: Tensor) -> None:
        """Copy a segment's tokens from its chunks to their places in `out`, which is contiguous."""
        heads, size = out_BTHN.shape[2:]
        if segment.grid is not None:
            grid = self._grid(out_BTHN, segment.grid)
            grid.copy_(x_ZCN.view(grid.shape))
            return
        x = x_ZCN.view(-1, heads, self.chunk_size, size).transpose(1, 2).to(out_BTHN.dtype)
        x, tokens = x.reshape(-1, heads, size), segment.tokens
        if segment.used is not None:
            x, tokens = x.index_select(0, segment.used), tokens.index_select(0, segment.used)
        out_BTHN.view(-1, heads, size).index_copy_(0, tokens, x)

    def _grid(self, x_BTHN: Tensor, grid: tuple[slice, slice]) -> Tensor:
        """View [rounds, sequences, H, C, N] of a segment of a regular grid."""
        rounds, sequences = grid
        heads, size = x_BTHN.shape[2:]
        # Sequences, not batch: equal documents that were packed into one row are a grid as well.
        chunks = x_BTHN.view(self.num_sequences, -1, self.chunk_size, heads, size)
        return chunks[sequences, rounds].permute(1, 0, 3, 2, 4)


@lru_cache(maxsize=32)
def build_layout(
    shape: tuple[int, ...], borders: tuple[int, ...] | None, itemsize: int, device: torch.device
) -> Layout:
    """Layout of inputs [B,T,H,N], or of the documents between `borders` (B = 1).

    `itemsize` is the number of bytes of one value of the arithmetic.
    """
    batch, num_tokens, heads, size = shape
    if borders is None:
        borders = tuple(range(0, batch * num_tokens + 1, num_tokens))
    lengths = torch.tensor(borders).diff()
    chunk_size = _choose_chunk_size(lengths)
    counts, ranked = _num_chunks(lengths, chunk_size).sort(descending=True, stable=True)
    round_sizes = torch.bincount(counts).flip(0).cumsum(0).flip(0)[1:]
    first_chunk = torch.cat([round_sizes.new_zeros(1), round_sizes.cumsum(0)])
    num_chunks, num_sequences = int(first_chunk[-1]), len(lengths)

    round_of_chunk = torch.repeat_interleave(round_sizes)
    sequence_of_chunk = ranked[torch.arange(num_chunks) - first_chunk[round_of_chunk]]
    position = (round_of_chunk * chunk_size).unsqueeze(1) + torch.arange(chunk_size)
    used = position < lengths[sequence_of_chunk].unsqueeze(1)
    tokens = torch.where(used, position + torch.tensor(borders)[sequence_of_chunk].unsqueeze(1), 0)
    regular = bool(used.all()) and bool((round_sizes == num_sequences).all())

    def segment(pieces: list[Piece]) -> Segment:
        chunks = slice(pieces[0].chunks.start, pieces[-1].chunks.stop)
        rounds = slice(chunks.start // num_sequences, (chunks.stop - 1) // num_sequences + 1)
        here = used[chunks].flatten()
        return Segment(
            tuple(pieces),
            grid=(rounds, pieces[0].ranks) if regular else None,
            tokens=tokens[chunks].flatten().to(device),
            used=None if here.all() else here.nonzero().squeeze(1).to(device),
            padding=None if here.all() else here.logical_not().nonzero().squeeze(1).to(device),
        )

    chunk_bytes = heads * chunk_size * size * itemsize
    limit = max(1, SEGMENT_BYTES.get(device.type, DEFAULT_SEGMENT_BYTES) // chunk_bytes)
    rank = ranked.argsort()
    return Layout(
        chunk_size,
        num_sequences,
        num_chunks,
        tuple(segment(pieces) for pieces in _group(_cut_pieces(round_sizes.tolist(), limit), limit)),
        ranked=ranked.to(device),
        rank=rank.to(device),
        final_state=(num_sequences + first_chunk[counts - 1] + torch.arange(num_sequences))[rank].to(device),
    )


def _num_chunks(lengths: Tensor, chunk_size: int) -> Tensor:
    return (lengths + chunk_size - 1).div(chunk_size, rounding_mode="floor")


def _choose_chunk_size(lengths: Tensor) -> int:
    """The chunk size with the least estimated time for sequences of these lengths."""
    return min(CHUNK_COST, key=lambda size: CHUNK_COST[size] * size * int(_num_chunks(lengths, size).sum()))


def _cut_pieces(round_sizes: list[int], limit: int) -> list[Piece]:
    """Pieces of all chunks, in order, none longer than `limit` chunks."""
    pieces = []
    first_chunk, first_state = 0, 0
    for round_size in round_sizes:
        for low in range(0, round_size, limit):
            high = min(low + limit, round_size)
            chunks = slice(first_chunk + low, first_chunk + high)
            pieces.append(Piece(chunks, slice(low, high), slice(first_state + low, first_state + high)))
        first_state = round_sizes[0] + first_chunk
        first_chunk += round_size
    return pieces


def _group(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """Consecutive pieces of at most `limit` chunks together.

    A round longer than `limit` starts with a piece of exactly `limit`, which shares its group with no other: on a
    regular grid a group is either whole rounds or a part of one.
    """
    groups: list[list[Piece]] = [[]]
    num_chunks = 0
    for piece in pieces:
        length = piece.ranks.stop - piece.ranks.start
        if num_chunks + length > limit:
            groups.append([])
            num_chunks = 0
        groups[-1].append(piece)
        num_chunks += length
    return groups
