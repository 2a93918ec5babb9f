"""Batch: what one forward pass gets. The only place where labels are shifted against inputs.

B batch, T tokens. A document's tokens d[0 .. n] give inputs d[0 .. n-1] and labels d[1 .. n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process. Labels are aligned: labels_BT[b, t] is the target of position t."""

    ids_BT: Tensor
    """int64 inputs; right-padded with 0."""
    labels_BT: Tensor
    """int64 targets; -100 where the loss does not count."""
    target_rows_R: Tensor
    """int64 positions of the targets in the flattened labels: found here, a device need not be waited for."""
    cu_seqlens: tuple[int, ...] | None
    """S + 1 borders of a packed batch (B = 1): document s is cu[s] .. cu[s + 1]. None: padded. Plain numbers, because
    they lay out the work on the host, and wrappers of a model move tensors to its device."""
    num_tokens: int
    """Input positions that are not padding."""
    sample_ids: tuple[int, ...]
    """Rows of the data set in this batch; empty for a dummy."""

    @property
    def num_targets(self) -> int:
        """Labels that are not -100."""
        return len(self.target_rows_R)

    def pinned(self) -> Batch:
        """The batch in pinned host memory, from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy does not block."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        names = ("ids_BT", "labels_BT", "target_rows_R")
        return replace(self, **{name: move(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document: n + 1 tokens for n inputs."""

    ids: np.ndarray
    is_target: np.ndarray | None
    """bool per token; None: all are."""


def shift(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels) of a piece, int64, both one shorter than its tokens."""
    ids = piece.ids.astype(np.int64)
    labels = ids[1:]
    if piece.is_target is not None:
        labels = np.where(piece.is_target[1:], labels, IGNORE_INDEX)
    return ids[:-1], labels


def pack_batch(rows: Sequence[Sequence[Piece]], sample_ids: Sequence[int]) -> Batch:
    """All pieces of all rows side by side in one row [1, T], with their borders in cu_seqlens."""
    shifted = [shift(piece) for row in rows for piece in row]
    ids = np.concatenate([inputs for inputs, _ in shifted])
    labels = np.concatenate([labels for _, labels in shifted])
    borders = np.cumsum([0] + [len(inputs) for inputs, _ in shifted])
    return _batch(ids[None], labels[None], tuple(borders.tolist()), len(ids), sample_ids)


def pad_batch(rows: Sequence[Sequence[Piece]], sample_ids: Sequence[int]) -> Batch:
    """One piece per row, right-padded to the longest of them: [B, T]."""
    assert all(len(row) == 1 for row in rows)
    shifted = [shift(row[0]) for row in rows]
    longest = max(len(inputs) for inputs, _ in shifted)
    ids = np.zeros((len(rows), longest), np.int64)
    labels = np.full((len(rows), longest), IGNORE_INDEX, np.int64)
    for index, (row_ids, row_labels) in enumerate(shifted):
        ids[index, : len(row_ids)] = row_ids
        labels[index, : len(row_labels)] = row_labels
    return _batch(ids, labels, None, sum(len(inputs) for inputs, _ in shifted), sample_ids)


def dummy_batch(packed: bool) -> Batch:
    """A batch that counts for nothing: one position without a target, for a process that has no rows left."""
    nothing = np.full((1, 1), IGNORE_INDEX)
    return _batch(np.zeros((1, 1), np.int64), nothing, (0, 1) if packed else None, 0, ())


def _batch(
    ids: np.ndarray, labels: np.ndarray, borders: tuple[int, ...] | None, num_tokens: int, sample_ids: Sequence[int]
) -> Batch:
    target_rows = torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX).astype(np.int64))
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), target_rows, borders, num_tokens, tuple(sample_ids))
