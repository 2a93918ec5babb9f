"""Folders of derived arrays, found again by a fingerprint of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rwkv_accel.errors import UserError

STALE_SECONDS = 7 * 24 * 3600
CONTENT_MODULES = (
    "binidx", "documents", "hf_tokenizer", "jinja_template", "messages", "packing", "sources", "store", "template",
    "tokenizer",
)  # fmt: skip


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Name of a cache folder: a digest of the parts and of the code that makes the content."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


@cache
def code_version() -> str:
    """Digest of the source that makes tokens and rows, and of the encoder's version: a change makes new folders."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("pyrwkv-tokenizer").encode())
    for name in CONTENT_MODULES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def make_once(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The folder root/name, built if it is not there. It appears complete or not at all.

    Two processes that build at the same time do no harm: the first to finish wins.

    Raises:
        UserError: the folder cannot be written.
    """
    final = root / name
    if final.is_dir():
        return final
    part = root / f"{name}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        part.mkdir()
        build(part)
        for file in part.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            os.rename(part, final)
        except OSError:
            if not final.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"data.cache_dir {root} cannot be written ({error.strerror}); choose another, or null to do without"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def content_digest(path: Path, root: Path) -> str:
    """sha256 of a file. Remembered in root by path, size and time of change, so that it is read only once."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    memo = root / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if memo.is_file() and len(known := memo.read_text()) == 64:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_name(f"{memo.name}.{os.getpid()}.tmp")
        part.write_text(digest)
        os.replace(part, memo)
    except OSError as error:
        raise UserError(
            f"data.cache_dir {root} cannot be written ({error.strerror}); choose another, or null to do without"
        ) from None
    return digest


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _remove_stale(root: Path) -> None:
    """Leftovers of processes that were killed while they built."""
    for part in root.glob("*.tmp"):
        try:
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)
        except FileNotFoundError:
            continue
