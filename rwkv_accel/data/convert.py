"""Between kinds of files: text or conversations -> tokens (binidx, arrow, parquet), tokens -> jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_accel.config.schema import DataConfig
from rwkv_accel.data.binidx import write_binidx
from rwkv_accel.data.corpus import read_documents
from rwkv_accel.data.documents import Document, ReadReport
from rwkv_accel.data.tokenizer import Tokenizer
from rwkv_accel.errors import UserError

DOCUMENTS_PER_WRITE = 1000


def convert(data: DataConfig, tokenizer: Tokenizer, target: Path) -> Iterator[str]:
    """Write all documents of data.path into the target, whose suffix says the kind; yields what was done.

    .bin (binidx): tokens alone. .arrow and .parquet: input_ids and labels (-100 where the loss does not
    count), which keep the mask. .jsonl: the text. The target appears complete or not at all.

    Raises:
        UserError: the kind is unknown, the target exists, or the documents cannot be read.
    """
    writers: dict[str, Callable[[Iterator[Document], Tokenizer, Path], int]] = {
        ".bin": _write_binidx,
        ".arrow": _write_arrow,
        ".parquet": _write_arrow,
        ".jsonl": _write_jsonl,
    }
    if target.suffix not in writers:
        raise UserError(f"cannot write {target}: the name must end in {', '.join(writers)}")
    if target.exists():
        raise UserError(f"{target} exists; choose another name or remove it")
    report, masked = ReadReport(), [0]

    def counted() -> Iterator[Document]:
        for document in read_documents(data, tokenizer, report):
            masked[0] += not all(document.is_target[1:])
            yield document

    try:
        number = writers[target.suffix](counted(), tokenizer, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    yield f"{number:,} documents written to {target}"
    if masked[0] and target.suffix in (".bin", ".jsonl"):
        yield f"warning: {masked[0]:,} of them have tokens that are no targets; {target.suffix} cannot keep that"
    if report.num_skipped:
        yield f"{report.num_skipped:,} skipped, first: {report.first_skipped}"


def _write_binidx(documents: Iterator[Document], tokenizer: Tokenizer, target: Path) -> int:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    return write_binidx(target, (document.ids for document in documents), dtype)[0]


def _write_jsonl(documents: Iterator[Document], tokenizer: Tokenizer, target: Path) -> int:
    def write(part: Path) -> int:
        number = 0
        with part.open("w", encoding="utf-8") as file:
            for document in documents:
                number += 1
                file.write(json.dumps({"text": tokenizer.decode(document.ids)}, ensure_ascii=False) + "\n")
            _sync(file)
        return number

    return _atomically(target, write)


def _write_arrow(documents: Iterator[Document], tokenizer: Tokenizer, target: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])

    def write(part: Path) -> int:
        number = 0
        with part.open("wb") as file:
            # The stream format is what Dataset.from_file and the arrow builder of `datasets` read.
            is_arrow = target.suffix == ".arrow"
            with pa.ipc.new_stream(file, schema) if is_arrow else pq.ParquetWriter(file, schema) as writer:
                while block := list(islice(documents, DOCUMENTS_PER_WRITE)):
                    number += len(block)
                    writer.write_table(pa.table([_column(block, False), _column(block, True)], schema=schema))
            _sync(file)
        return number

    def _column(block: list[Document], labels: bool) -> list[list[int]]:
        if not labels:
            return [document.ids for document in block]
        return [[i if flag else -100 for i, flag in zip(d.ids, d.is_target)] for d in block]

    return _atomically(target, write)


def _atomically(target: Path, write: Callable[[Path], int]) -> int:
    part = target.with_name(f"{target.name}.tmp")
    try:
        number = write(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return number


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
