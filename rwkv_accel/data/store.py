"""Tokenised documents in flat arrays: tokens back to back, where each begins, which ones the loss counts."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_accel.data.binidx import BinIdx
from rwkv_accel.data.documents import Document
from rwkv_accel.errors import UserError

META = "meta.json"
FLUSH_TOKENS = 1 << 22


@dataclass(frozen=True)
class DocumentStore:
    """Document d has tokens ids[offsets[d] : offsets[d + 1]], end of text included.

    Arrays may be memory maps.
    """

    ids: np.ndarray
    """uint16 or int32 (any integer type from a binidx), all tokens."""
    is_target: np.ndarray | None
    """bool, per token; None if all are targets. The first token of a document never is one in effect."""
    offsets: np.ndarray
    """int64, one more than documents."""
    num_targets: np.ndarray | None
    """int64, targets per document; None if all tokens but the first are."""
    total_targets: int
    max_id: int
    """Largest token id, -1 without tokens."""

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1] - self.offsets[0])


class _Column:
    """Growing numbers, in memory or, with a file, in memory only up to the next flush."""

    def __init__(self, typecode: str, path: Path | None) -> None:
        self.values = array(typecode)
        self._path, self._file = path, path.open("wb") if path else None

    def flush(self) -> None:
        if self._file:
            self.values.tofile(self._file)
            del self.values[:]

    def finish(self, dtype: Any) -> np.ndarray:
        if self._file is None or self._path is None:
            return np.frombuffer(self.values, dtype) if self.values else np.zeros(0, dtype)
        self.flush()
        self._file.close()
        return _map(self._path, dtype)

    def discard(self) -> None:
        """Give up the numbers, which turned out to say nothing."""
        if self._file and self._path:
            self._file.close()
            self._path.unlink()


def build_store(documents: Iterable[Document], vocab_size: int, folder: Path | None = None) -> DocumentStore:
    """Collect documents: 2 or 4 bytes per token, and one for the flag if any token is not a target.

    In memory, or memory-mapped from files in the folder, which open_store opens again.
    """
    small = vocab_size <= 1 << 16
    dtype, limit = (np.uint16, 1 << 16) if small else (np.int32, 1 << 31)
    ids, flags, offsets, num_targets = (
        _Column(code, folder / name if folder else None)
        for code, name in (("H" if small else "i", "ids"), ("B", "flags"), ("q", "offsets"), ("q", "num_targets"))
    )
    num_tokens, total_targets, num_documents, max_id, all_targets = 0, 0, 0, -1, True
    offsets.values.append(0)
    for document in documents:
        top = max(document.ids)
        if top >= limit:
            raise UserError(f"{document.place}: token {top}, but the tokenizer has only {vocab_size} ids")
        ids.values.extend(document.ids)
        flags.values.extend(document.is_target)
        count = sum(document.is_target[1:])
        num_tokens += len(document.ids)
        offsets.values.append(num_tokens)
        num_targets.values.append(count)
        all_targets = all_targets and all(document.is_target)
        total_targets, num_documents, max_id = total_targets + count, num_documents + 1, max(max_id, top)
        if len(ids.values) >= FLUSH_TOKENS:
            for column in (ids, flags, offsets, num_targets):
                column.flush()
    if all_targets:
        flags.discard()
        num_targets.discard()
    store = DocumentStore(
        ids.finish(dtype),
        None if all_targets else flags.finish(np.bool_),
        offsets.finish(np.int64),
        None if all_targets else num_targets.finish(np.int64),
        total_targets,
        max_id,
    )
    if folder:
        meta = {"dtype": np.dtype(dtype).name, "total_targets": total_targets, "max_id": max_id}
        (folder / META).write_text(json.dumps(meta))
    return store


def open_store(folder: Path) -> DocumentStore:
    """Memory-map a store that build_store left in a folder."""
    meta = json.loads((folder / META).read_text())
    masked = (folder / "flags").exists()
    return DocumentStore(
        _map(folder / "ids", np.dtype(meta["dtype"])),
        _map(folder / "flags", np.bool_) if masked else None,
        _map(folder / "offsets", np.int64),
        _map(folder / "num_targets", np.int64) if masked else None,
        meta["total_targets"],
        meta["max_id"],
    )


def store_of_binidx(binidx: BinIdx, max_documents: int | None, max_id: int) -> DocumentStore:
    """A binidx as a store, without a copy: every token but the first of a document is a target."""
    offsets = binidx.offsets[: None if max_documents is None else max_documents + 1]
    targets = int(offsets[-1] - offsets[0]) - int(np.count_nonzero(offsets[1:] != offsets[:-1]))
    return DocumentStore(binidx.tokens, None, offsets, None, targets, max_id)


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
