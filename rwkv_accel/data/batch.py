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
    cu_seqlens: Tensor | None
    """int32 [S + 1] borders of a packed batch (B = 1): document s is cu[s] .. cu[s + 1]. None: padded."""
    num_targets: int
    """Labels that are not -100."""
    num_tokens: int
    """Input positions that are not padding."""
    sample_ids: tuple[int, ...]
    """Rows of the data set in this batch; empty for a dummy."""

    def pinned(self) -> Batch:
        """The batch in pinned host memory, from which a GPU copies while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy does not block."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        borders = None if self.cu_seqlens is None else move(self.cu_seqlens)
        return replace(self, ids_BT=move(self.ids_BT), labels_BT=move(self.labels_BT), cu_seqlens=borders)


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
    return Batch(
        torch.from_numpy(ids)[None],
        torch.from_numpy(labels)[None],
        torch.from_numpy(borders.astype(np.int32)),
        int((labels != IGNORE_INDEX).sum()),
        len(ids),
        tuple(sample_ids),
    )


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
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        None,
        int((labels != IGNORE_INDEX).sum()),
        sum(len(inputs) for inputs, _ in shifted),
        tuple(sample_ids),
    )


def dummy_batch(packed: bool) -> Batch:
    """A batch that counts for nothing: one position without a target, for a process that has no rows left."""
    return Batch(
        torch.zeros(1, 1, dtype=torch.int64),
        torch.full((1, 1), IGNORE_INDEX, dtype=torch.int64),
        torch.tensor([0, 1], dtype=torch.int32) if packed else None,
        num_targets=0,
        num_tokens=0,
        sample_ids=(),
    )
