"""Sources that are read on and on, from any place where they were left: the place is a small plain dict."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.sources import (
    Record,
    Source,
    blame,
    open_bytes,
    open_table,
    parse_line,
    read_records,
    table_record,
)
from rwkv_accel.errors import UserError


class RecordStream(Protocol):
    """One source, read from a place to its end."""

    def records(self, place: dict[str, Any] | None) -> Iterator[Record]:
        """The records that follow a place; None: all."""
        ...

    def place(self) -> dict[str, Any]:
        """Where the next record begins, JSON-ready. Valid while records() is read, between two records."""
        ...


def open_stream(source: Source, data: DataConfig) -> RecordStream:
    """Raises UserError for a binidx, which is memory-mapped and can be read anywhere at once."""
    if source.is_binidx:
        raise UserError(f"data.path {source.path} is memory-mapped and needs no streaming; set data.streaming=false")
    if source.kind == ".jsonl":
        return LineStream(source.path)
    if source.kind == ".txt":
        return CountedStream(source, data)
    return TableStream(source, data)


class LineStream:
    """A .jsonl file or URL: the place is a byte offset, so that going on costs one seek."""

    def __init__(self, path: str) -> None:
        self._path, self._offset, self._line = path, 0, 0

    def records(self, place: dict[str, Any] | None) -> Iterator[Record]:
        self._offset, self._line = (place["offset"], place["line"]) if place else (0, 0)
        with blame(self._path), open_bytes(self._path) as file:
            if self._offset:
                file.seek(self._offset)
            for line in file:
                self._offset += len(line)
                self._line += 1
                if record := parse_line(self._path, self._line, line):
                    yield record

    def place(self) -> dict[str, Any]:
        return {"offset": self._offset, "line": self._line}


class TableStream:
    """A hub data set, a saved folder, or a table: the place is the state of `datasets` itself."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        self._source, self._data = source, data
        self._table: Any = None
        self._row = 0

    def records(self, place: dict[str, Any] | None) -> Iterator[Record]:
        with blame(self._source.path):
            self._table = open_table(self._source, self._data)
            if not hasattr(self._table, "load_state_dict"):
                self._table = self._table.to_iterable_dataset()
            self._row = place["row"] if place else 0
            if place:
                self._table.load_state_dict(place["table"])
            for fields in self._table:
                self._row += 1
                yield table_record(self._source, self._row, fields)

    def place(self) -> dict[str, Any]:
        return {"table": self._table.state_dict(), "row": self._row}


class CountedStream:
    """A .txt file, which is in memory as a whole: the place is the number of documents before it."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        self._source, self._data, self._passed = source, data, 0

    def records(self, place: dict[str, Any] | None) -> Iterator[Record]:
        self._passed = place["passed"] if place else 0
        for record in islice(read_records(self._source, self._data), self._passed, None):
            self._passed += 1
            yield record

    def place(self) -> dict[str, Any]:
        return {"passed": self._passed}
