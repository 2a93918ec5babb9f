"""Documents -> rows of at most ctx_len input positions.

A document of n tokens (end of text included) has n - 1 inputs: its last token is only ever a target.
Documents that share a row are independent, each starts from a fresh state. A document longer than ctx_len
that is split gives pieces that overlap by one token, so that every token is a target exactly once; each
piece starts from a fresh state too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_accel.data.sampler import permute
from rwkv_accel.data.store import DocumentStore
from rwkv_accel.progress import progress

# Best fit runs within blocks of this many pieces, so that memory and time stay linear in the documents.
BLOCK_PIECES = 1 << 17
ARRAYS = ("piece_document", "piece_start", "piece_length", "row_offsets")
COUNTS = "counts.npy"
# The split is one more permutation of the same family, of an epoch that no run reaches.
SPLIT_EPOCH = (1 << 31) - 1


@dataclass(frozen=True)
class RowPlan:
    """Which piece of which document is in which row. Row r: pieces row_offsets[r] .. row_offsets[r + 1]."""

    piece_document: np.ndarray
    """int64, index into the store."""
    piece_start: np.ndarray
    """int64, first token of the piece within its document."""
    piece_length: np.ndarray
    """int32, input positions of the piece."""
    row_offsets: np.ndarray
    """int64, one more than rows."""
    num_overlong: int
    """Documents longer than ctx_len, whatever became of them."""
    num_without_target: int
    """Documents or pieces left out because the loss counts none of their tokens."""

    num_tokens: int
    """Input positions of all rows."""

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1


@dataclass(frozen=True)
class Subset:
    """One side of a split of the documents into a training part and a held-out part."""

    fraction: float
    """Share of the documents that is held out; at least one document is."""
    seed: int
    """The same seed gives the same split."""
    held_out: bool
    """Which side this is."""

    def chosen(self, num_documents: int) -> np.ndarray:
        """Which documents belong to this side; the two sides are disjoint and complete."""
        rank = permute(np.arange(num_documents, dtype=np.int64), num_documents, self.seed, SPLIT_EPOCH)
        return (rank < max(1, round(self.fraction * num_documents))) == self.held_out


def plan_rows(
    store: DocumentStore,
    *,
    ctx_len: int,
    packing: str,
    overlong: str,
    keep_order: bool,
    subset: Subset | None = None,
) -> RowPlan:
    """Cut documents to ctx_len and put the pieces into rows.

    packing: pack (best fit; with keep_order next fit, in the order of documents), pad (a piece per row), or
    bucket (a piece per row, rows sorted by length).
    overlong: split, truncate or drop.
    """
    assert packing in ("pack", "pad", "bucket")
    assert overlong in ("split", "truncate", "drop")
    documents, starts, lengths, num_overlong = _cut(store, ctx_len, overlong)
    if subset is not None:
        chosen = subset.chosen(store.num_documents)[documents]
        documents, starts, lengths = documents[chosen], starts[chosen], lengths[chosen]
    useful = _has_target(store, documents, starts, lengths)
    without_target = int(len(useful) - useful.sum())
    documents, starts, lengths = documents[useful], starts[useful], lengths[useful]
    if packing == "pack":
        order, offsets = next_fit(lengths, ctx_len) if keep_order else best_fit(lengths, ctx_len)
    else:
        order = np.argsort(lengths, kind="stable") if packing == "bucket" else np.arange(len(lengths))
        offsets = np.arange(len(lengths) + 1, dtype=np.int64)
    documents, starts, lengths = documents[order], starts[order], lengths[order]
    num_tokens = int(lengths.sum(dtype=np.int64))
    return RowPlan(documents, starts, lengths, offsets, num_overlong, without_target, num_tokens)


def save_plan(plan: RowPlan, folder: Path) -> None:
    """Write a plan into a folder, for open_plan."""
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(plan, name))
    np.save(folder / COUNTS, np.array([plan.num_overlong, plan.num_without_target, plan.num_tokens]))


def open_plan(folder: Path) -> RowPlan:
    """Memory-map a saved plan."""
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
    return RowPlan(*arrays, *np.load(folder / COUNTS).tolist())


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing bin packing, block by block; (order of the pieces, row offsets into that order)."""
    orders: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for begin in progress(range(0, len(lengths), BLOCK_PIECES), "packing", unit="blocks of documents"):
        block = lengths[begin : begin + BLOCK_PIECES]
        row_of = _best_fit_block(block, capacity)
        orders.append(np.argsort(row_of, kind="stable") + begin)
        counts.append(np.bincount(row_of))
    if not orders:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    return np.concatenate(orders), np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)


def _best_fit_block(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece: longest first, each into the fullest row that still takes it."""
    row_of = np.zeros(len(lengths), np.int64)
    levels: list[int] = []  # distinct amounts of free space, ascending
    rows_at: dict[int, list[int]] = {}
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        slot = bisect_left(levels, length)
        if slot == len(levels):
            row, free = num_rows, capacity - length
            num_rows += 1
        else:
            level = levels[slot]
            row, free = rows_at[level].pop(), level - length
            if not rows_at[level]:
                del levels[slot]
        row_of[piece] = row
        if free:
            rows = rows_at.setdefault(free, [])
            if not rows:
                insort(levels, free)
            rows.append(row)
    return row_of


def next_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled in the given order, a new one whenever the next piece does not fit."""
    offsets, used = [0], 0
    for piece, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            offsets.append(piece)
            used = 0
        used += length
    if len(lengths):
        offsets.append(len(lengths))
    return np.arange(len(lengths), dtype=np.int64), np.array(offsets, np.int64)


def _cut(store: DocumentStore, ctx_len: int, overlong: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(document, start, length) of all pieces in document order, and the number of overlong documents."""
    inputs = np.maximum(np.diff(store.offsets) - 1, 0)
    is_long = inputs > ctx_len
    documents = np.arange(len(inputs), dtype=np.int64)
    if overlong == "drop":
        kept = ~is_long
        return (
            documents[kept],
            np.zeros(kept.sum(), np.int64),
            inputs[kept].astype(np.int32),
            int(is_long.sum()),
        )
    if overlong == "truncate":
        lengths = np.minimum(inputs, ctx_len).astype(np.int32)
        return documents, np.zeros(len(inputs), np.int64), lengths, int(is_long.sum())
    pieces = np.maximum(-(-inputs // ctx_len), 1)
    documents = np.repeat(documents, pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (np.arange(len(documents)) - first) * ctx_len
    lengths = np.minimum(inputs[documents] - starts, ctx_len).astype(np.int32)
    return documents, starts, lengths, int(is_long.sum())


def _has_target(store: DocumentStore, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether the loss counts any token of each piece."""
    if store.is_target is None or store.num_targets is None:
        return lengths > 0
    useful = (lengths > 0) & (store.num_targets[documents] > 0)
    whole = np.diff(store.offsets)[documents] == lengths + 1
    for piece in np.flatnonzero(useful & ~whole).tolist():
        begin = int(store.offsets[documents[piece]] + starts[piece]) + 1
        useful[piece] = store.is_target[begin : begin + int(lengths[piece])].any()
    return useful
