"""Rows by number: what the loader draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.batch import Piece
from rwkv_accel.data.binidx import BinIdx, magic_prime
from rwkv_accel.data.cache import fingerprint, make_once
from rwkv_accel.data.corpus import Corpus, RunFirst
from rwkv_accel.data.packing import RowPlan, Subset, open_plan, plan_rows, save_plan
from rwkv_accel.data.store import DocumentStore

CACHE_MIN_DOCUMENTS = 200_000
SAMPLED_BLOCKS = 256
BLOCK_TOKENS = 4096


class RowSource(Protocol):
    """A source of rows 0 <= r < num_rows."""

    @property
    def num_rows(self) -> int: ...

    def pieces(self, row: int) -> list[Piece]:
        """The runs of tokens in a row; each starts from a fresh state."""
        ...


@dataclass(frozen=True)
class PlannedRows:
    """Rows of documents, as a plan puts them together."""

    store: DocumentStore
    plan: RowPlan

    @property
    def num_rows(self) -> int:
        return self.plan.num_rows

    def pieces(self, row: int) -> list[Piece]:
        store, plan = self.store, self.plan
        pieces = []
        for piece in range(int(plan.row_offsets[row]), int(plan.row_offsets[row + 1])):
            begin = int(store.offsets[plan.piece_document[piece]] + plan.piece_start[piece])
            end = begin + int(plan.piece_length[piece]) + 1
            flags = None if store.is_target is None else store.is_target[begin:end]
            pieces.append(Piece(store.ids[begin:end], flags))
        return pieces

    def num_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Input positions of each of the rows, int64."""
        ends = self._tokens_before_row
        return ends[rows + 1] - ends[rows]

    @cached_property
    def _tokens_before_row(self) -> np.ndarray:
        before_piece = np.concatenate([[0], np.cumsum(self.plan.piece_length, dtype=np.int64)])
        return before_piece[self.plan.row_offsets]

    def parts(self) -> tuple[list[int], list[np.ndarray]]:
        """Counts and arrays that tell these rows from others."""
        store = self.store
        whole = slice(int(store.offsets[0]), int(store.offsets[-1]))
        arrays = [store.ids[whole]] if store.is_target is None else [store.ids[whole], store.is_target[whole]]
        return [self.num_rows, self.plan.num_tokens, store.num_documents, store.total_targets], arrays

    def documents(self, row: int) -> list[int]:
        """Documents of the store that are in a row."""
        first, end = self.plan.row_offsets[row : row + 2]
        return sorted(set(self.plan.piece_document[first:end].tolist()))


@dataclass(frozen=True)
class FlatRows:
    """Rows of ctx_len + 1 tokens out of the flat stream of a binidx: row r begins at token r * ctx_len.

    Documents run into each other without a reset, as in official pretraining.
    """

    binidx: BinIdx
    ctx_len: int

    @cached_property
    def num_rows(self) -> int:
        """The magic prime: the order of rows needs it."""
        return magic_prime(len(self.binidx.tokens), self.ctx_len)

    def pieces(self, row: int) -> list[Piece]:
        begin = row * self.ctx_len
        return [Piece(self.binidx.tokens[begin : begin + self.ctx_len + 1], None)]

    def num_tokens(self, rows: np.ndarray) -> np.ndarray:
        """Input positions of each of the rows, int64."""
        return np.full(len(rows), self.ctx_len, np.int64)

    def parts(self) -> tuple[list[int], list[np.ndarray]]:
        """Counts and arrays that tell these rows from others."""
        return [self.num_rows], [self.binidx.tokens]


def digest_rows(sources: Sequence[PlannedRows | FlatRows]) -> str:
    """Names what the rows hold: all counts, and of the tokens all if they are few, else blocks spread evenly."""
    digest = hashlib.sha256()
    for source in sources:
        counts, arrays = source.parts()
        digest.update(repr([*map(int, counts), *map(len, arrays)]).encode())
        for array in arrays:
            digest.update(_sample(array))
    return f"sha256:{digest.hexdigest()}"


def _sample(array: np.ndarray) -> bytes:
    if len(array) <= SAMPLED_BLOCKS * BLOCK_TOKENS:
        return array.tobytes()
    starts = np.linspace(0, len(array) - BLOCK_TOKENS, SAMPLED_BLOCKS).astype(np.int64).tolist()
    return b"".join(array[start : start + BLOCK_TOKENS].tobytes() for start in starts)


def plan_corpus(corpus: Corpus, data: DataConfig, run_first: RunFirst, subset: Subset | None = None) -> PlannedRows:
    """Rows of a corpus, or of one side of its split; the plan of a large one is kept in the cache."""
    settings: dict[str, object] = {
        "ctx_len": data.ctx_len,
        "packing": data.packing,
        "overlong": data.overlong,
        "keep_order": not data.shuffle,
        "subset": subset,
    }

    def build(folder: Path) -> None:
        save_plan(plan_rows(corpus.store, **settings), folder)  # type: ignore[arg-type]

    if corpus.identity is None or data.cache_dir is None or corpus.store.num_documents < CACHE_MIN_DOCUMENTS:
        return PlannedRows(corpus.store, plan_rows(corpus.store, **settings))  # type: ignore[arg-type]
    root = Path(data.cache_dir) / "rows"
    name = fingerprint({"corpus": corpus.identity, **settings, "subset": None if subset is None else asdict(subset)})
    run_first(lambda: make_once(root, name, build))
    return PlannedRows(corpus.store, open_plan(make_once(root, name, build)))


def highest_token(rows: list[list[Piece]]) -> int:
    """Largest token id in rows."""
    return max(int(np.max(piece.ids)) for row in rows for piece in row)
