"""Rows of streams: sources that are read while training, whose end is not known and may never come.

Documents are read in blocks of `data.stream_block`. A block is cut, packed and shuffled like a small data set of its
own, and its rows follow those of the block before. Every process reads the same stream and takes its share of the
rows, so that the order does not depend on their number. A place in the stream is the state of the sources where a
block begins: going on from row r reads the block of row r again and skips the rows before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.batch import Piece
from rwkv_accel.data.documents import Document, DocumentReader, ReadReport
from rwkv_accel.data.packing import plan_rows
from rwkv_accel.data.record_streams import RecordStream, open_stream
from rwkv_accel.data.rows import PlannedRows
from rwkv_accel.data.sampler import derive_seed, permute
from rwkv_accel.data.sources import Source, find_sources
from rwkv_accel.data.store import build_store
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

ENDLESS = 1 << 62
"""Rows of a stream, as far as arithmetic is concerned."""
# So many documents in a row without a single row for the model are no accident.
FRUITLESS_DOCUMENTS = 10_000


class Chain:
    """Documents of sources one after the other, and again from the first one when the last has ended."""

    def __init__(self, sources: list[Source], data: DataConfig, reader: DocumentReader, report: ReadReport) -> None:
        self._streams: list[RecordStream] = [open_stream(source, data) for source in sources]
        self._names, self._reader, self._report = [source.path for source in sources], reader, report
        self._source, self._in_pass = 0, 0
        self._from: dict[str, Any] | None = None
        self._reading = False
        self.num_tokens = 0
        """Of all documents so far."""

    def documents(self) -> Iterator[Document | None]:
        """Documents without end; None where a pass over all sources has ended.

        Raises:
            UserError: a record cannot be used, or a whole pass has no document.
        """
        while True:
            stream, place, self._from = self._streams[self._source], self._from, None
            records = stream.records(place)
            self._reading = True
            for document in self._reader.documents(records, self._report):
                self._in_pass += 1
                self.num_tokens += len(document.ids)
                yield document
            self._reading = False
            self._source += 1
            if self._source == len(self._streams):
                if not self._in_pass:
                    skipped = f"; {self._report.num_skipped} skipped, first: {self._report.first_skipped}"
                    tail = skipped if self._report.num_skipped else ""
                    raise UserError(f"data.path {', '.join(self._names)} holds no documents{tail}")
                self._source, self._in_pass = 0, 0
                yield None

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        place = self._streams[self._source].place() if self._reading else self._from
        return {"source": self._source, "place": place, "in_pass": self._in_pass, "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before documents() is called."""
        self._source, self._from, self._reading = state["source"], state["place"], False
        self._in_pass, self.num_tokens = state["in_pass"], state["num_tokens"]


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled among each other: first_row and those that follow."""

    first_row: int
    rows: PlannedRows
    order: np.ndarray
    after: dict[str, Any]
    """The state of the stream behind this block."""

    @property
    def end(self) -> int:
        return self.first_row + self.rows.num_rows


class StreamRows:
    """Rows 0, 1, 2, ... of the streams in data.path, asked for in rising order. Reads one block ahead.

    With data.weights each next document comes from the source that is furthest behind its share of the tokens.
    """

    num_rows = ENDLESS

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._data, self._tokenizer, self._seed = data, tokenizer, seed
        self._sources = find_sources(data)
        self._weights = data.weights or (1.0,)
        self._marks: list[dict[str, Any]] = []
        self._block: Block | None = None
        self._ahead: Future[Block] | None = None
        self._worker: ThreadPoolExecutor | None = None
        self.report = ReadReport()
        self.load_state_dict(None)

    def first_block(self) -> Block:
        """The block at the present place; reads it unless that has happened."""
        if self._block is None:
            self._enter(self._read_block())
        assert self._block is not None
        return self._block

    def pieces(self, row: int) -> list[Piece]:
        """The runs of tokens in a row; each starts from a fresh state."""
        block = self.first_block()
        assert row >= block.first_row, f"row {row} has been passed: the stream is at {block.first_row}"
        while row >= block.end:
            block = self._enter(self._read_ahead().result())
        self._ahead = self._read_ahead()
        return block.rows.pieces(int(block.order[row - block.first_row]))

    def seek(self, row: int) -> None:
        """Go to a row that was not forgotten, or on from the state that was loaded."""
        if self._block is None or not self._block.first_row <= row < self._block.end:
            self.close()
            self._open(self.state_dict(row))

    def summary(self, row: int) -> str:
        """What was read for the rows before this one, to the end of their block, and what was left out of it."""
        # A run that starts again when it is over reads no block: it knows what came before its own.
        behind = next((mark for mark in self._marks if mark["row"] >= row), self._marks[-1])
        documents, overlong, without_target = behind["counts"]
        skipped, first = behind["skipped"]
        parts = [f"{documents:,} documents read"]
        if overlong:
            done = {"split": "split", "truncate": "truncated", "drop": "dropped"}[self._data.overlong]
            parts.append(f"{overlong:,} longer than {self._data.ctx_len} tokens and {done}")
        if without_target:
            parts.append(f"{without_target:,} documents or pieces without a target left out")
        if skipped:
            parts.append(f"{skipped:,} lines skipped, first: {first}")
        return "data: " + ", ".join(parts)

    def forget(self, row: int) -> None:
        """Rows before this one will not be asked for again."""
        while len(self._marks) > 1 and self._marks[1]["row"] <= row:
            self._marks.pop(0)

    def state_dict(self, row: int) -> dict[str, Any]:
        """What load_state_dict and seek(row) need to go on with this row, in another process too; JSON-ready."""
        return max((mark for mark in self._marks if mark["row"] <= row), key=lambda mark: mark["row"])

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """None: the beginning."""
        self.close()
        self._marks = [state or {"row": 0, "block": 0, "chains": [], "skipped": [0, ""], "counts": [0, 0, 0]}]
        self._open(self._marks[0])

    def close(self) -> None:
        """Stop reading ahead; waits for the block that is being read."""
        if self._worker is not None:
            self._worker.shutdown()
        self._worker, self._ahead, self._block = None, None, None

    def _open(self, mark: dict[str, Any]) -> None:
        self.report = ReadReport(*mark["skipped"])
        reader = DocumentReader(self._data, self._tokenizer)
        groups = [[source] for source in self._sources] if self._data.weights else [self._sources]
        self._chains = [Chain(group, self._data, reader, self.report) for group in groups]
        for chain, state in zip(self._chains, mark["chains"]):
            chain.load_state_dict(state)
        self._documents = [chain.documents() for chain in self._chains]
        self._next_row, self._next_number, self._counts = mark["row"], mark["block"], mark["counts"]

    def _read_ahead(self) -> Future[Block]:
        """The next block, on its way."""
        if self._ahead is None:
            self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="data-stream")
            self._ahead = self._worker.submit(self._read_block)
        return self._ahead

    def _enter(self, block: Block) -> Block:
        """Make a block the current one."""
        self._block, self._ahead = block, None
        self._marks.append(block.after)
        return block

    def _read_block(self) -> Block:
        fruitless, counts = 0, list(self._counts)
        while True:
            documents = self._read_documents()
            counts[0] += len(documents)
            store = build_store(documents, self._tokenizer.vocab_size)
            plan = plan_rows(
                store,
                ctx_len=self._data.ctx_len,
                packing=self._data.packing,
                overlong=self._data.overlong,
                keep_order=not self._data.shuffle,
            )
            counts[1] += plan.num_overlong
            counts[2] += plan.num_without_target
            if plan.num_rows:
                break
            fruitless += len(documents)
            if fruitless >= FRUITLESS_DOCUMENTS:
                raise UserError(
                    f"data.path: none of {fruitless:,} documents, the last being {documents[-1].place}, has a target "
                    f"within data.ctx_len {self._data.ctx_len}; raise data.ctx_len or set data.overlong=split, and "
                    "see that conversations have an assistant turn"
                )
        order = np.arange(plan.num_rows, dtype=np.int64)
        if self._data.shuffle:
            order = permute(order, plan.num_rows, derive_seed(self._seed, self._next_number))
        first = self._next_row
        self._next_row, self._next_number, self._counts = first + plan.num_rows, self._next_number + 1, counts
        after = {
            "row": self._next_row,
            "block": self._next_number,
            "chains": [chain.state_dict() for chain in self._chains],
            "skipped": [self.report.num_skipped, self.report.first_skipped],
            "counts": counts,
        }
        return Block(first, PlannedRows(store, plan), order, after)

    def _read_documents(self) -> list[Document]:
        """The next data.stream_block documents; fewer where a pass over all sources ends."""
        documents: list[Document] = []
        while len(documents) < self._data.stream_block:
            shares = [chain.num_tokens / weight for chain, weight in zip(self._chains, self._weights)]
            document = next(self._documents[shares.index(min(shares))])
            if document is not None:
                documents.append(document)
            elif len(self._chains) == 1 and documents:
                break
        return documents
