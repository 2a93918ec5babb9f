"""Files, folders, URLs and hub names -> records, each with the place it came from.

Broken input is named by file and line number. jsonl and plain text are read line by line here; the other
kinds go through Hugging Face `datasets`.
"""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.errors import UserError

TEXT_BREAK = re.compile(r"\n{3,}")
HUB_PREFIX = "hub:"
# Suffix -> name of the builder in `datasets`.
TABLE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json"}
LINE_KINDS = (".jsonl", ".txt")
BINIDX_KINDS = (".bin", ".idx")


class Record(NamedTuple):
    """One document as the source has it."""

    place: str
    """File and line number, or source and row number."""
    fields: dict[str, Any] | None
    """Columns, or None where the line is broken."""
    problem: str = ""
    """What is wrong with the line."""


class Source(NamedTuple):
    """One entry of `data.path`, checked."""

    path: str
    kind: str
    """A suffix of the tables above, `hub`, or `folder` (of Dataset.save_to_disk)."""

    @property
    def is_local(self) -> bool:
        return self.kind != "hub" and "://" not in self.path

    @property
    def is_binidx(self) -> bool:
        return self.kind in BINIDX_KINDS

    def local_files(self) -> list[Path]:
        """The files that the content lies in; none for a hub name or a URL."""
        if not self.is_local:
            return []
        if self.kind == "folder":
            return sorted(p for p in Path(self.path).rglob("*") if p.is_file())
        if self.is_binidx:
            return [Path(self.path).with_suffix(suffix) for suffix in BINIDX_KINDS]
        return [Path(self.path)]


def find_sources(data: DataConfig) -> list[Source]:
    """The entries of `data.path`.

    Raises:
        UserError: none is given, or one is missing or of a kind that is not known.
    """
    paths = (data.path,) if isinstance(data.path, str) else data.path
    if not paths:
        raise UserError("data.path is empty; name at least one file")
    return [_find(path) for path in paths]


def missing_files(path: str) -> list[str]:
    """Files of one data path that this machine does not have; none for a hub name or a URL."""
    if path.startswith(HUB_PREFIX) or "://" in path:
        return []
    local = Path(path)
    stem = local.with_suffix("") if local.suffix in BINIDX_KINDS else local
    pair = [stem.with_name(stem.name + suffix) for suffix in BINIDX_KINDS]
    is_pair = local.suffix in BINIDX_KINDS or (not local.exists() and pair[0].is_file())
    return [str(file) for file in (pair if is_pair else [local]) if not file.exists()]


def set_names(paths: Sequence[str]) -> list[str]:
    """What logs call each file: its name without suffix, after as many folders as tell it from the others.

    Raises:
        UserError: a file is given twice.
    """
    parts = [Path(path).with_suffix("").parts for path in paths]
    names = []
    for index, (path, own) in enumerate(zip(paths, parts)):
        if path in paths[:index]:
            raise UserError(f"{path} is given twice in the eval section; name it once")
        unlike = [n for n in range(1, len(own) + 2) if sum(other[-n:] == own[-n:] for other in parts) == 1]
        # Files that differ in the suffix alone keep it.
        names.append("/".join(own[-unlike[0] :]) if unlike else path)
    return names


def read_records(source: Source, data: DataConfig) -> Iterator[Record]:
    """Records of one source, in its order; memory is that of one line, or of the file for .txt."""
    if source.kind == ".jsonl":
        return _read_jsonl(source.path)
    if source.kind == ".txt":
        return _read_txt(source.path)
    return _read_table(source, data)


def remote_identity(source: Source, data: DataConfig) -> list[str]:
    """Names the content of a hub data set or of a URL, without reading it."""
    with blame(source.path):
        if source.kind == "hub":
            import datasets

            name = source.path.removeprefix(HUB_PREFIX)
            return ["hub", name, str(datasets.load_dataset_builder(name, data.subset).hash)]
        import fsspec

        system, path = fsspec.core.url_to_fs(source.path)
        return ["url", source.path, str(system.ukey(path))]


def _find(path: str) -> Source:
    kinds = ", ".join((*LINE_KINDS, *TABLE_KINDS, *BINIDX_KINDS))
    if path.startswith(HUB_PREFIX):
        return Source(path, "hub")
    suffix = Path(path).suffix
    if "://" in path:
        if suffix not in LINE_KINDS and suffix not in TABLE_KINDS:
            raise UserError(f"data.path {path}: of a URL only {', '.join((*LINE_KINDS, *TABLE_KINDS))} can be read")
        return Source(path, suffix)
    local = Path(path)
    if local.is_dir():
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return Source(path, "folder")
        raise UserError(f"data.path {path} is a folder; name the files in it")
    if suffix not in BINIDX_KINDS and local.with_name(local.name + ".bin").is_file() and not local.exists():
        local, suffix = local.with_name(local.name + ".bin"), ".bin"
    if not local.is_file():
        raise UserError(f"data.path {path} does not exist{_nearest(local)}")
    if suffix not in LINE_KINDS and suffix not in TABLE_KINDS and suffix not in BINIDX_KINDS:
        raise UserError(f"data.path {path}: files of kind {suffix or 'none'} are not read; use {kinds}")
    return Source(str(local), suffix)


def open_bytes(path: str) -> io.BufferedIOBase:
    """A local file or a URL, for reading."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    with blame(path):
        return fsspec.open(path, "rb").open()


def _read_jsonl(path: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if record := parse_line(path, number, line):
                yield record


def parse_line(path: str, number: int, line: bytes) -> Record | None:
    """The record in a line of a .jsonl file; None for an empty line."""
    place = f"{path}:{number}"
    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    if not line.strip():
        return None
    try:
        # Without the line's end, which would count as a new line in the message.
        fields = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(place, None, f"not UTF-8 (byte {line[error.start]:#04x} at {error.start})")
    except json.JSONDecodeError as error:
        return Record(place, None, f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})")
    except RecursionError:
        return Record(place, None, "JSON nested too deeply")
    if not isinstance(fields, dict):
        return Record(place, None, f"a line must be a JSON object, got {type(fields).__name__}")
    return Record(place, fields)


def _read_txt(path: str) -> Iterator[Record]:
    with open_bytes(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}); convert it, e.g. with iconv -t utf-8"
        ) from None
    text, line, start = text.replace("\r\n", "\n"), 1, 0
    for gap in [*TEXT_BREAK.finditer(text), None]:
        part = text[start : gap.start() if gap else len(text)]
        if part.strip():
            leading = len(part) - len(part.lstrip("\n"))
            yield Record(f"{path}:{line + leading}", {"text": part.strip("\n")})
        if gap:
            line += part.count("\n") + len(gap[0])
            start = gap.end()


def _read_table(source: Source, data: DataConfig) -> Iterator[Record]:
    with blame(source.path):
        for number, fields in enumerate(open_table(source, data), 1):
            yield table_record(source, number, fields)


def open_table(source: Source, data: DataConfig) -> Any:
    """The data set of `datasets` behind a hub name, a saved folder or a table; iterable, perhaps streaming."""
    import datasets

    # What it logs before it raises is said once more, in our words, by `blame`.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    if source.kind == "folder":
        table = datasets.load_from_disk(source.path)
    elif source.kind == "hub":
        name = source.path.removeprefix(HUB_PREFIX)
        table = datasets.load_dataset(name, data.subset, split=data.split, streaming=data.streaming)
    else:
        kind = TABLE_KINDS[source.kind]
        table = datasets.load_dataset(kind, data_files=[source.path], split="train", streaming=True)
    if isinstance(table, dict):
        if data.split not in table:
            raise UserError(f"data.path {source.path} has no split {data.split!r}, only {', '.join(table)}")
        table = table[data.split]
    return table


def table_record(source: Source, number: int, fields: Any) -> Record:
    return Record(f"{source.path} row {number}", dict(fields))


@contextmanager
def blame(path: str) -> Iterator[None]:
    """Turn whatever a reading library raises into one line that names the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  datasets, fsspec and their readers raise anything at all
        raise UserError(f"data.path {path} cannot be read: {_one_line(error)}{_remedy(path, error)}") from None


def _remedy(path: str, error: BaseException) -> str:
    if isinstance(error, ImportError) and path.startswith("s3://"):
        return "; pip install s3fs"
    if type(error).__name__ == "NoCredentialsError":
        return "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, PermissionError) and "://" in path:
        return "; check the credentials and what they may read"
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
