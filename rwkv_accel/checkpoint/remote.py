"""A run's copy in remote storage: how it is laid out, written, pruned and brought back.

<remote_url>/
    checkpoints/step-00001200-7/    the files of a checkpoint folder; manifest.json is written last and marks it
                                    complete. The number after the name is the order of writing, so that
                                    nothing is ever overwritten
    adapter/epoch-0003/  best/step-00001200/   saved weights; upload.json is written last. adapter/LATEST
    logs/                           loss_data.json and its likes, as of the newest checkpoint or later; report.html
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rwkv_accel.checkpoint.format import (
    CHECKPOINTS_DIR,
    INTERRUPTED,
    MANIFEST_FILE,
    STEP_PREFIX,
    TMP_SUFFIX,
    DamagedCheckpoint,
    Manifest,
    give_final_name,
    parse_manifest,
    sha256_of,
    sync,
)
from rwkv_accel.checkpoint.retention import stays
from rwkv_accel.checkpoint.store import Moved, RemoteStore, WrongBytes, nowhere
from rwkv_accel.checkpoint.weights import BEST_DIR, LATEST_FILE, WEIGHTS_DIR
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.errors import UserError
from rwkv_accel.progress import ProgressLine

logger = logging.getLogger(__name__)

LOGS_DIR = "logs"
UPLOAD_FILE = "upload.json"
MEBIBYTE = 1 << 20
# Strict: a folder of another program that happens to lie here is neither read nor removed.
NAME = re.compile(rf"(?P<name>{STEP_PREFIX}(?P<step>\d+)|{INTERRUPTED})-(?P<sequence>\d+)")

Files = Mapping[str, tuple[int, str]]
"""Bytes and sha256 of each file of a folder."""


@dataclass(frozen=True)
class Remote:
    """The storage of this run, found usable."""

    store: RemoteStore
    newest_sequence: int
    """Of any checkpoint there, finished or not: what is written now must be newer."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """One folder below checkpoints/ that has its manifest."""

    folder: str
    """Relative to the store."""
    name: str
    step: int | None
    """None if the name does not say it."""
    sequence: int
    files: dict[str, int]
    """Bytes of each file that is there."""


def open_remote(config: CheckpointConfig) -> Remote | None:
    """The storage that the recipe names, if it names one, after proof that it can be written.

    Raises:
        UserError: it cannot be used.
    """
    if config.remote_url is None:
        return None
    store = RemoteStore(config.remote_url, config.remote_options, verify=config.remote_verify)
    store.check()
    complete, unfinished = list_checkpoints(store)
    return Remote(store, max((found.sequence for found in (*complete, *unfinished)), default=0))


def put_checkpoint(store: RemoteStore, local: Path, target: str, moved: Moved = nowhere) -> None:
    """Upload a complete checkpoint folder; its manifest goes last."""
    content = (local / MANIFEST_FILE).read_bytes()
    _put_folder(store, local, target, parse_manifest(content, local).files, MANIFEST_FILE, content, moved)


def put_weights(store: RemoteStore, local: Path, target: str, step: int, moved: Moved = nowhere) -> None:
    """Upload a folder of saved weights to adapter/<name> or best/<name>."""
    files = {path.name: (path.stat().st_size, sha256_of(path)) for path in sorted(local.iterdir())}
    content = json.dumps({"step": step, "files": files}, indent=1).encode()
    _put_folder(store, local, target, files, UPLOAD_FILE, content, moved)
    kind, _, name = target.partition("/")
    if kind == WEIGHTS_DIR:
        store.put_bytes(f"{name}\n".encode(), f"{WEIGHTS_DIR}/{LATEST_FILE}")


def put_logs(store: RemoteStore, out_dir: Path, names: tuple[str, ...]) -> None:
    """Upload what the run has logged so far."""
    for name in names:
        path = out_dir / name
        if path.is_file():
            store.put_bytes(path.read_bytes(), f"{LOGS_DIR}/{name}")


def put_report(store: RemoteStore, path: Path) -> None:
    """Upload report.html if it is there: as a file, so that a browser is told what it is."""
    if path.is_file():
        store.put(path, f"{LOGS_DIR}/{path.name}", path.stat().st_size, sha256_of(path))


def remote_name(name: str, manifest: Manifest) -> str:
    """Name of a checkpoint folder in remote storage."""
    return f"{name}-{manifest.sequence}"


def parse_name(folder: str, files: dict[str, int]) -> RemoteCheckpoint | None:
    """What the name of a folder below checkpoints/ says; None if this trainer did not choose it."""
    parts = NAME.fullmatch(folder.rpartition("/")[2])
    if parts is None:
        return None
    step = None if parts["step"] is None else int(parts["step"])
    return RemoteCheckpoint(folder, parts["name"], step, int(parts["sequence"]), files)


def list_checkpoints(store: RemoteStore) -> tuple[list[RemoteCheckpoint], list[RemoteCheckpoint]]:
    """Checkpoints with a manifest, oldest first, and those without one: uploads that did not end."""
    complete: list[RemoteCheckpoint] = []
    unfinished: list[RemoteCheckpoint] = []
    for folder, files in _folders(store, CHECKPOINTS_DIR).items():
        found = parse_name(folder, files)
        if found is not None:
            (complete if MANIFEST_FILE in files else unfinished).append(found)
    return sorted(complete, key=lambda found: found.sequence), unfinished


def prune_checkpoints(store: RemoteStore, config: CheckpointConfig) -> None:
    """Remove what retention does not keep, what was written again later, and uploads that did not end."""
    complete, unfinished = list_checkpoints(store)
    newest_names: list[str] = []
    surplus = []
    for found in reversed(complete):
        is_replaced = found.name in newest_names
        is_kept = found.step is not None and stays(found.name, found.step, config.keep_every_n_steps)
        if is_replaced or (len(newest_names) >= config.keep_last and not is_kept):
            surplus.append(found)
        if not is_replaced:
            newest_names.append(found.name)
    for found in surplus + unfinished:
        _remove_folder(store, found.folder, found.files, MANIFEST_FILE)


def prune_weights(store: RemoteStore, config: CheckpointConfig, target: str) -> None:
    """Remove saves that are too many after `target` has arrived: all others of best/, the oldest of adapter/."""
    kind = target.partition("/")[0]
    keep = 1 if kind == BEST_DIR else config.keep_weights
    if keep is None:
        return
    folders = _folders(store, kind)
    steps = {}
    for folder in folders:
        marker = store.get_bytes(f"{folder}/{UPLOAD_FILE}")
        steps[folder] = json.loads(marker)["step"] if marker else -1
    others = sorted((folder for folder in folders if folder != target), key=lambda folder: steps[folder])
    for folder in others[: max(0, len(folders) - keep)]:
        _remove_folder(store, folder, folders[folder], UPLOAD_FILE)


def fetch_checkpoint(store: RemoteStore, found: RemoteCheckpoint, checkpoints: Path) -> Path:
    """Download into checkpoints/<name>: whole, with every byte checked, or not at all.

    Raises:
        DamagedCheckpoint: a file is missing, cut off or altered there.
        RemoteError: the storage cannot be read.
        UserError: the local disk refused.
    """
    where = f"{store.url}/{found.folder}"
    content = store.get_bytes(f"{found.folder}/{MANIFEST_FILE}")
    if content is None:
        raise DamagedCheckpoint(f"{where} has no {MANIFEST_FILE}: it is not a complete checkpoint of this trainer")
    manifest = parse_manifest(content, where)
    for name, (num_bytes, _) in manifest.files.items():
        if name not in found.files:
            raise DamagedCheckpoint(f"checkpoint {where} is damaged: {name} is missing")
        if found.files[name] != num_bytes:
            raise DamagedCheckpoint(
                f"checkpoint {where} is damaged: {name} has {found.files[name]} bytes instead of {num_bytes}"
            )
    try:
        return _fetch_folder(store, found.folder, checkpoints / found.name, manifest.files, (MANIFEST_FILE, content))
    except WrongBytes as damage:
        raise DamagedCheckpoint(f"checkpoint {where} is damaged: {damage}") from None


def fetch_results(store: RemoteStore, out_dir: Path, log_names: tuple[str, ...]) -> None:
    """Bring back the logs, the newest saved weights and best/; what is missing or damaged there is left out."""
    for name in log_names:
        content = store.get_bytes(f"{LOGS_DIR}/{name}")
        if content is not None:
            (out_dir / name).write_bytes(content)
    latest = (store.get_bytes(f"{WEIGHTS_DIR}/{LATEST_FILE}") or b"").decode().strip()
    if (
        latest
        and "/" not in latest
        and _fetch_weights(store, f"{WEIGHTS_DIR}/{latest}", out_dir / WEIGHTS_DIR / latest)
    ):
        (out_dir / WEIGHTS_DIR / LATEST_FILE).write_text(latest + "\n", encoding="utf-8")
    for folder in _folders(store, BEST_DIR):
        _fetch_weights(store, folder, out_dir / BEST_DIR)


def _fetch_weights(store: RemoteStore, folder: str, local: Path) -> bool:
    content = store.get_bytes(f"{folder}/{UPLOAD_FILE}")
    if content is None:
        return False
    try:
        files = {name: (int(size), str(sha256)) for name, (size, sha256) in json.loads(content)["files"].items()}
        _fetch_folder(store, folder, local, files)
    except WrongBytes as damage:
        logger.warning("saved weights %s/%s are damaged: %s; left out", store.url, folder, damage)
        return False
    return True


def _put_folder(
    store: RemoteStore, local: Path, target: str, files: Files, marker: str, content: bytes, moved: Moved
) -> None:
    present = store.get_bytes(f"{target}/{marker}")
    if present == content:
        return
    if present is not None:
        store.remove([f"{target}/{marker}"])
    before = 0
    for name, (num_bytes, sha256) in files.items():
        store.put(local / name, f"{target}/{name}", num_bytes, sha256, partial(_moved_after, before, moved))
        before += num_bytes
    store.put_bytes(content, f"{target}/{marker}")


def _moved_after(before: int, moved: Moved, num_bytes: int) -> None:
    moved(before + num_bytes)


def _fetch_folder(
    store: RemoteStore, folder: str, local: Path, files: Files, marker: tuple[str, bytes] | None = None
) -> Path:
    tmp = local.with_name(local.name + TMP_SUFFIX)
    total = sum(num_bytes for num_bytes, _ in files.values())
    line = ProgressLine(f"downloading {folder}", total=mebibytes(total), unit="MiB")
    before = 0
    for name in files:
        if Path(name).name != name:
            raise WrongBytes(f"{name!r} is no file name")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        for name, (num_bytes, sha256) in files.items():
            moved = partial(_moved_after, before, lambda num_bytes: line.at(mebibytes(num_bytes)))
            store.get(f"{folder}/{name}", tmp / name, num_bytes, sha256, moved)
            before += num_bytes
        if marker is not None:
            (tmp / marker[0]).write_bytes(marker[1])
        for path in [*tmp.iterdir(), tmp]:
            sync(path)
        give_final_name(tmp, local)
    except OSError as error:
        raise UserError(
            f"cannot download {store.url}/{folder} to {local}: {error.strerror or error}; free some space or mend the "
            "folder's permissions"
        ) from None
    finally:
        line.close()
        shutil.rmtree(tmp, ignore_errors=True)
    return local


def mebibytes(num_bytes: int) -> int:
    """Rounded up: a small file is one of one."""
    return -(-num_bytes // MEBIBYTE)


def _remove_folder(store: RemoteStore, folder: str, files: Mapping[str, int], marker: str) -> None:
    # The marker first: what is left of an unfinished removal must not look complete.
    names = sorted(files, key=lambda name: name != marker)
    store.remove([f"{folder}/{name}" for name in names])


def _folders(store: RemoteStore, top: str) -> dict[str, dict[str, int]]:
    """The folders directly below one, with the sizes of their files."""
    folders: dict[str, dict[str, int]] = {}
    for name, size in store.files(top).items():
        folder, slash, file = name.partition("/")
        if slash:
            folders.setdefault(f"{top}/{folder}", {})[file] = size
    return folders
