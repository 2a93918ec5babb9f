"""binidx, the token format of RWKV pretraining: name.bin (tokens back to back) and name.idx (where
documents are).

Little endian. The .idx is: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 n, u64 m, n x i32 lengths of
the items in tokens, n x i64 byte offsets of the items in the .bin, m x i64 borders of the documents as item
numbers (from 0 to n). Source: RWKV-LM train_temp/src/binidx.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_accel.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are float types, on which readers disagree and which no tokens are.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
MAX_IDLE_SHARE = 0.1
BLOCK_ITEMS = 1 << 20


@dataclass(frozen=True)
class BinIdx:
    """An opened binidx, memory-mapped."""

    path: Path
    """The .bin file."""
    tokens: np.ndarray
    """All tokens, in the file's type."""
    offsets: np.ndarray
    """int64, one more than documents: where each begins, in tokens."""

    def highest_token(self, num_tokens: int) -> int:
        """Largest of the first tokens, 0 without any. Read, not mapped: mapped pages would stay in memory."""
        top, numbers = 0, _Numbers(self.path, self.tokens.dtype.str, 0, min(num_tokens, len(self.tokens)))
        for begin in range(0, numbers.count, BLOCK_ITEMS):
            top = max(top, int(numbers.read(begin, begin + BLOCK_ITEMS).max()))
        return top

    @property
    def num_surplus(self) -> int:
        """Tokens behind the last document, which no document holds."""
        return len(self.tokens) - int(self.offsets[-1])


def open_binidx(path: str | Path) -> BinIdx:
    """Open name.bin with name.idx; `path` is either of the two, or the name without a suffix.

    Raises:
        UserError: a file is missing, or the two do not fit together; says what is wrong and where.
    """
    bin_path, idx_path = _pair(path)
    lengths, starts, borders, dtype = _read_index(idx_path)
    size = bin_path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"{bin_path}: {size} bytes are no whole number of {dtype.name} tokens; the file is cut off")
    item_starts = _item_starts(idx_path, lengths, starts, dtype.itemsize)
    if item_starts[-1] * dtype.itemsize > size:
        bad = int(np.searchsorted(item_starts, size // dtype.itemsize, side="right")) - 1
        raise UserError(
            f"{idx_path}: item {bad} ends at byte {item_starts[bad + 1] * dtype.itemsize}, but {bin_path} has only "
            f"{size}; one of the two is cut off or they do not belong together"
        )
    tokens = np.memmap(bin_path, dtype, "r") if size else np.zeros(0, dtype)
    return BinIdx(bin_path, tokens, _document_starts(idx_path, item_starts, borders))


def write_binidx(path: str | Path, documents: Iterable[Iterable[int]], dtype: type = np.uint16) -> tuple[int, int]:
    """Write name.bin and name.idx; (documents, tokens). Documents are written as they are: end them with
    token 0.

    Both files appear complete or not at all.

    Raises:
        UserError: a token does not fit the type.
    """
    bin_path, idx_path = _pair(path, must_exist=False)
    bounds, lengths = np.iinfo(dtype), list[int]()
    part_bin, part_idx = (p.with_name(p.name + ".tmp") for p in (bin_path, idx_path))
    try:
        with part_bin.open("wb") as file:
            for document in documents:
                ids = np.fromiter(document, np.int64)
                if len(ids) and (ids.min() < bounds.min or ids.max() > bounds.max):
                    raise UserError(
                        f"{bin_path}: document {len(lengths)} holds token {int(ids.max())}, too large for "
                        f"{np.dtype(dtype).name}; use i32"
                    )
                file.write(ids.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                lengths.append(len(ids))
            _sync(file)
        with part_idx.open("wb") as file:
            file.write(index_bytes(np.array(lengths, np.int64), np.dtype(dtype)))
            _sync(file)
        os.replace(part_bin, bin_path)
        os.replace(part_idx, idx_path)
    finally:
        part_bin.unlink(missing_ok=True)
        part_idx.unlink(missing_ok=True)
    return len(lengths), sum(lengths)


def magic_prime(num_tokens: int, ctx_len: int) -> int:
    """Largest prime p with p % 3 == 2 and p <= num_tokens // ctx_len - 1: x -> x^3 permutes the slots below
    it.

    Source: RWKV-LM train_temp/src/dataset.py and RWKV-v5/make_data.py.

    Raises:
        UserError: the data has too few rows for a prime that covers more than 90% of them.
    """
    slots = num_tokens // ctx_len
    for candidate in range(slots - 1, int(slots * (1 - MAX_IDLE_SHARE)), -1):
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
    raise UserError(
        f"magic_prime: {num_tokens} tokens give {slots} rows of ctx_len {ctx_len}, too few for a prime that uses 90% "
        "of them; use data.sampling=documents or a smaller data.ctx_len"
    )


def magic_slot(sample: int, prime: int) -> int:
    """Row of the flat token stream that sample number 1, 2, 3, ... of the official order reads."""
    factor = int(prime * ((5**0.5 - 1) / 2))
    return factor * pow(sample, 3, prime) % prime


def _is_prime(n: int) -> bool:
    """Miller-Rabin with the bases that are exact below 3.3e24 (Sorenson and Webster, 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % base == 0 for base in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        if not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


@dataclass(frozen=True)
class _Numbers:
    """An array in a file, read piece by piece: a mapped index of millions of items would stay in memory."""

    path: Path
    dtype: str
    offset: int
    count: int

    def read(self, begin: int, end: int) -> np.ndarray:
        width = np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, self.dtype, min(end, self.count) - begin, offset=self.offset + begin * width)


def _pair(path: str | Path, must_exist: bool = True) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")
    for file in pair:
        if must_exist and not file.is_file():
            raise UserError(f"{file} does not exist; a binidx is name.bin with name.idx beside it")
    return pair


def _read_index(path: Path) -> tuple[_Numbers, _Numbers, _Numbers, np.dtype]:
    """(lengths, byte offsets, document borders, type of the tokens)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path} is not the index of a binidx (it does not begin with MMIDIDX)")
    _, version, code, items, borders = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path}: version {version} with dtype code {code} is not read; known codes: {list(DTYPES)}")
    expected = HEADER.size + 12 * items + 8 * borders
    if size != expected:
        raise UserError(f"{path} has {size} bytes, its header announces {expected}; the file is damaged or cut off")
    lengths = _Numbers(path, "<i4", HEADER.size, items)
    starts = _Numbers(path, "<i8", HEADER.size + 4 * items, items)
    return lengths, starts, _Numbers(path, "<i8", HEADER.size + 12 * items, borders), np.dtype(DTYPES[code])


def _item_starts(path: Path, lengths: _Numbers, starts: _Numbers, itemsize: int) -> np.ndarray:
    """Where each item begins, and where the last one ends, in tokens."""
    item_starts = np.zeros(lengths.count + 1, np.int64)
    for begin in range(0, lengths.count, BLOCK_ITEMS):
        sizes = lengths.read(begin, begin + BLOCK_ITEMS).astype(np.int64)
        if sizes.min() < 0:
            raise UserError(f"{path}: item {begin + int(np.argmax(sizes < 0))} has a negative length; it is damaged")
        ends = item_starts[begin] + np.cumsum(sizes)
        item_starts[begin + 1 : begin + 1 + len(ends)] = ends
        if not np.array_equal(starts.read(begin, begin + BLOCK_ITEMS), (ends - sizes) * itemsize):
            raise UserError(f"{path}: items do not lie back to back; write the binidx anew")
    return item_starts


def _document_starts(path: Path, item_starts: np.ndarray, borders: _Numbers) -> np.ndarray:
    """item_starts at the documents' borders; the array itself in the usual case of one item per document."""
    if borders.count == len(item_starts) and all(
        np.array_equal(
            borders.read(begin, begin + BLOCK_ITEMS), np.arange(begin, min(begin + BLOCK_ITEMS, borders.count))
        )
        for begin in range(0, borders.count, BLOCK_ITEMS)
    ):
        return item_starts
    items, chosen = len(item_starts) - 1, borders.read(0, borders.count)
    if not len(chosen) or chosen[0] != 0 or chosen[-1] != items or (np.diff(chosen) < 0).any():
        raise UserError(f"{path}: document borders do not rise from 0 to {items} items; the file is damaged")
    return item_starts[chosen]


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The .idx of documents of these lengths in tokens."""
    starts = (np.cumsum(lengths) - lengths) * dtype.itemsize
    borders = np.arange(len(lengths) + 1)
    head = HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(borders))
    parts = (lengths.astype("<i4"), starts.astype("<i8"), borders.astype("<i8"))
    return head + b"".join(part.tobytes() for part in parts)


def _sync(file: object) -> None:
    file.flush()  # type: ignore[attr-defined]
    os.fsync(file.fileno())  # type: ignore[attr-defined]
