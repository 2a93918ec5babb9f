"""loss_data.json: a JSON array that grows by one record per logged step and can be read at every moment.

Two copies of the array take turns. A record goes into the hidden copy, together with the one that this copy missed
before, and the finished copy then takes the visible name by an atomic rename. So whoever opens loss_data.json gets a
complete array, whatever happens to the writer between two system calls or within one, and an append writes two
records, however long the file is. A reader may keep the file open for a whole logging interval before the copy that
it reads is written to again.

Copies share the name through hard links. A filesystem without them gets one copy that is extended in place by a single
write: valid again at once after each write, and repaired at the next start if the writer died within one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rwkv_accel.tracking.record import json_ready

TAIL = b"\n]"


class LossJson:
    """Writer of one loss_data.json. One process at a time."""

    def __init__(self, path: Path, resume_step: int):
        """Keep the records up to resume_step, drop the later ones, and be ready to append.

        Reads the file once; what is left of a torn write is dropped and counted in `num_damaged`.
        """
        self.num_damaged = 0
        self.num_records = 0
        self._copies: list[_Copy] = []
        self._is_unpublished = False
        self._path, self._link = path, path.with_name(f".{path.name}.link")
        self._names = [path.with_name(f".{path.name}.{k}") for k in (0, 1)]
        self._build(self._kept_lines(resume_step))

    @property
    def has_two_copies(self) -> bool:
        """False on a filesystem without hard links."""
        return len(self._copies) == 2

    def append(self, record: dict[str, Any]) -> None:
        """Add one record. Cost does not depend on the length of the file. NaN and infinities become null.

        Raises:
            OSError: the disk refused. The visible file is as it was; the record comes with the next one, or `flush`.
        """
        entry = self._entry(json.dumps(json_ready(record), allow_nan=False).encode())
        for copy in self._copies:
            copy.lacks += entry
        self.flush()

    def flush(self) -> None:
        """Bring on disk what an append could not. Raises OSError as append does."""
        older = self._copies[-1]
        if not older.lacks and not self._is_unpublished:
            return
        older.catch_up()
        if self.has_two_copies:
            self._is_unpublished = True
            self._publish(self._names[-1])
            self._is_unpublished = False
            self._copies.reverse()
            self._names.reverse()

    def keep_first(self, count: int) -> None:
        """Drop all records after the first `count`: they came after the checkpoint that the run goes on from."""
        if count >= self.num_records:
            return
        for copy in self._copies:
            copy.close()
        self._build(itertools.islice(self._kept_lines(), count))

    def close(self) -> None:
        """Leave the visible file alone in the folder, with all that the disk will take."""
        with suppress(OSError):
            self.flush()
        for copy in self._copies:
            copy.close()
        for name in [*self._names, self._link]:
            with suppress(OSError):  # a folder that has become read-only
                name.unlink(missing_ok=True)

    def _entry(self, line: bytes) -> bytes:
        self.num_records += 1
        return (b"\n" if self.num_records == 1 else b",\n") + line

    def _build(self, lines: Iterator[bytes]) -> None:
        # The kept records are written anew: nothing depends on what a killed writer left beside the file.
        for name in [*self._names, self._link]:
            name.unlink(missing_ok=True)
        self.num_records = 0
        first = _Copy(self._names[0])
        for line in lines:
            first.write(self._entry(line))
        first.finish()
        try:
            os.link(self._names[0], self._link)
        except OSError:
            os.replace(self._names[0], self._path)
            self._copies = [first]
            return
        self._copies = [first, first.duplicate(self._names[1])]
        os.replace(self._link, self._path)

    def _publish(self, name: Path) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._link)  # of a try that failed between these two
        os.link(name, self._link)
        os.replace(self._link, self._path)

    def _kept_lines(self, resume_step: int | None = None) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            for line, record in _lines(file):
                if record is None:
                    self.num_damaged += 1
                elif resume_step is None or record["step"] <= resume_step:
                    yield line


class _Copy:
    """One file that holds `[`, the records, and TAIL."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._buffer = bytearray(b"[")
        self._end = 0
        self.lacks = bytearray()
        """Records that are not in this copy yet."""

    def write(self, data: bytes) -> None:
        """Buffered, while the file is being built."""
        self._buffer += data
        if len(self._buffer) > 1 << 20:
            self._flush()

    def finish(self) -> None:
        self._flush()
        _write_at(self._fd, TAIL, self._end)
        os.fsync(self._fd)

    def catch_up(self) -> None:
        """Write what is lacking. Raises OSError, and is then a complete array as before."""
        try:
            _write_at(self._fd, bytes(self.lacks) + TAIL, self._end)
        except OSError:
            with suppress(OSError):
                _write_at(self._fd, TAIL, self._end)
                os.ftruncate(self._fd, self._end + len(TAIL))
            raise
        self._end += len(self.lacks)
        self.lacks.clear()

    def duplicate(self, path: Path) -> _Copy:
        other, offset = _Copy(path), 0
        other._buffer.clear()
        while offset < self._end:
            other.write(os.pread(self._fd, min(1 << 20, self._end - offset), offset))
            offset = other._end + len(other._buffer)
        other.finish()
        return other

    def close(self) -> None:
        os.close(self._fd)

    def _flush(self) -> None:
        _write_at(self._fd, bytes(self._buffer), self._end)
        self._end += len(self._buffer)
        self._buffer.clear()


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(records, damaged ones that were left out) of a file that LossJson wrote, also while it is being written.

    A missing file has no records.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    found = [record for _, record in _lines(data.split(b"\n"))]
    return [record for record in found if record is not None], found.count(None)


def _lines(raw_lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each record's line and what it says; None for a damaged one."""
    for raw in raw_lines:
        line = raw.strip().rstrip(b",]")  # a torn write may have left `},]`
        if line not in (b"", b"["):
            yield line, _parse(line)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
