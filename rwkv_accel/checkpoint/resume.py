"""What a new start continues from, and whether it may."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_accel.checkpoint.collective import on_main_for_long
from rwkv_accel.checkpoint.format import (
    CHECKPOINTS_DIR,
    STATE_FILE,
    DamagedCheckpoint,
    age_key,
    list_folders,
    read_document,
    read_manifest,
    validate,
)
from rwkv_accel.checkpoint.remote import (
    RemoteCheckpoint,
    fetch_checkpoint,
    fetch_results,
    list_checkpoints,
    parse_name,
)
from rwkv_accel.checkpoint.store import RemoteStore
from rwkv_accel.config.checkpoint import CheckpointConfig
from rwkv_accel.errors import UserError
from rwkv_accel.tracking import LOG_FILES

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Sections that make a run this run, with the keys in them that may change on a resume.
IDENTITY_SECTIONS = ("model", "peft", "data", "optim")
IDENTITY_KEYS = (
    "trainer.seed",
    "trainer.precision",
    "trainer.l2wrap",
    "trainer.gradient_clip_val",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
    "eval.split_fraction",  # decides which documents are trained on
)
FREE_KEYS = frozenset(
    {
        "model.path",  # the base is known by its digest, wherever it lies
        "peft.load_path",  # what it brought is in the checkpoint
        "model.wkv_backend",  # the same maths on another device
        "data.on_bad_line",
        "data.cache_dir",
        "optim.offload",  # where the moments lie
    }
)
# What the numbers that best/, plateau and early stop go by are measured on.
MEASURE_KEYS = ("eval.path", "eval.limit_batches", "eval.limit_examples")
LENGTH_KEYS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_tokens")


def find_resume(
    out_dir: str | Path, resume: str, store: RemoteStore | None = None, options: dict[str, Any] | None = None
) -> Path | None:
    """The checkpoint that a start continues from, every byte of it checked, or None for a fresh start.

    What lies in remote storage is downloaded into out_dir/checkpoints first.

    Args:
        resume: `auto` takes the newest complete checkpoint and names the damaged ones it skips; `none`
            refuses a folder or storage that has a checkpoint; anything else is the path or URL of a checkpoint
            folder, or the URL of a run's storage.
        store: where the run keeps its copy.
        options: of fsspec, for a URL in `resume`.

    Raises:
        UserError: the path is no usable checkpoint, all of them are damaged, or `none` met a checkpoint.
    """
    checkpoints = Path(out_dir) / CHECKPOINTS_DIR
    if resume == "auto":
        return _newest(checkpoints, store)
    if resume == "none":
        _refuse_existing(checkpoints, store)
        return None
    is_url = "://" in resume
    if is_url or Path(resume).resolve().parent != checkpoints.resolve():
        own = _newest(checkpoints, store)
        if own is not None:
            # Started again after a stop: going back to where the run came from would throw its work away.
            logger.warning("checkpoint.resume %s is not taken again: this run has checkpoints of its own", resume)
            return own
    if is_url:
        return _from_url(resume, options or {}, checkpoints)
    try:
        validate(Path(resume), deep=True)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give another checkpoint.resume=<path>, or auto for the newest good one") from None
    return Path(resume)


def find_resume_on_all(
    accelerator: Accelerator, out_dir: str | Path, config: CheckpointConfig, store: RemoteStore | None = None
) -> Path | None:
    """find_resume on the main process, the answer or the error on every rank. Collective.

    Ranks that looked for themselves could differ (a network disk shows a rename late) and wait for ever.
    """
    return on_main_for_long(accelerator, lambda: find_resume(out_dir, config.resume, store, config.remote_options))


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: state, extra, config, base_digest, world_size, optimizer."""
    return read_document(folder, STATE_FILE)


def check_same_run(saved_config: dict[str, Any], config: dict[str, Any], checkpoint: object) -> None:
    """Refuse to continue a run under a recipe that contradicts it; another length of the run is announced.

    Both are dumps of RunConfig, with the rows per update in trainer.global_batch_size where they follow from
    other keys. Keys that only one side knows come from another version of the schema and are not compared. The
    checkpoint is named in the message.

    Raises:
        UserError: names each key that differs, with both values.
    """
    saved, new = _plain(saved_config), _plain(config)
    differing: list[str] = []
    for section in IDENTITY_SECTIONS:
        _compare(saved.get(section), new.get(section), section, differing)
    for key in (*IDENTITY_KEYS, *_batch_keys(saved, new)):
        _compare(_get(saved, key), _get(new, key), key, differing)
    if differing:
        raise UserError(
            f"the recipe contradicts the checkpoint {checkpoint}: {'; '.join(differing)}. Put the old values back to "
            "continue, or give another out_dir (and checkpoint.remote_url) for a new run"
        )
    for key in LENGTH_KEYS:
        old, now = _get(saved, key), _get(new, key)
        if old != now:
            logger.warning("%s was %s and is now %s: the schedule is stretched", key, _show(old), _show(now))
    for key in MEASURE_KEYS:
        old, now = _get(saved, key), _get(new, key)
        if old is not None and old != now:
            text = "%s was %s and is now %s: best/, plateau and early stop still compare with what was measured before"
            logger.warning(text, key, _show(old), _show(now))


def _newest(checkpoints: Path, store: RemoteStore | None) -> Path | None:
    """The newest good checkpoint of the folder and the storage together."""
    damaged: list[str] = []
    # Sorted by order of writing; what is here goes before its copy there.
    candidates: list[tuple[tuple[int, bool, int, bool], Path | RemoteCheckpoint]] = []
    for folder in list_folders(checkpoints):
        try:
            sequence, step, is_final = age_key(folder, read_manifest(folder))
            candidates.append(((sequence, True, step, is_final), folder))
        except DamagedCheckpoint as damage:
            damaged.append(str(damage))
    if store is not None:
        complete, unfinished = list_checkpoints(store)
        candidates += [((found.sequence, False, 0, True), found) for found in complete]
        for left in unfinished:
            logger.warning("%s/%s is incomplete, its upload did not end; skipped", store.url, left.folder)
    for _, found in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
        try:
            taken = _take(found, checkpoints, store)
        except DamagedCheckpoint as damage:
            damaged.append(str(damage))
            continue
        for message in damaged:
            logger.warning("%s; skipped", message)
        return taken
    if damaged:
        raise UserError(
            f"no usable checkpoint: {'; '.join(damaged)}. Bring back an intact copy, or give another out_dir "
            "for a fresh start"
        )
    return None


def _take(found: Path | RemoteCheckpoint, checkpoints: Path, store: RemoteStore | None) -> Path:
    if isinstance(found, Path):
        validate(found, deep=True)
        return found
    assert store is not None
    folder = fetch_checkpoint(store, found, checkpoints)
    fetch_results(store, checkpoints.parent, LOG_FILES)
    logger.warning("downloaded %s/%s", store.url, found.folder)
    return folder


def _from_url(url: str, options: dict[str, Any], checkpoints: Path) -> Path:
    """The checkpoint at a URL, or the newest good one of the run whose storage it is."""
    parent, _, name = url.rstrip("/").rpartition("/")
    found = parse_name(f"{CHECKPOINTS_DIR}/{name}", {}) if parent.endswith(f"/{CHECKPOINTS_DIR}") else None
    if found is None:
        folder = _newest(checkpoints, RemoteStore(url, options))
        if folder is None:
            raise UserError(f"checkpoint.resume {url} holds no complete checkpoint; see what is there, or give another")
        return folder
    store = RemoteStore(parent.removesuffix(f"/{CHECKPOINTS_DIR}"), options)
    found = replace(found, files=store.files(found.folder))
    try:
        return fetch_checkpoint(store, found, checkpoints)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give another checkpoint.resume=<url>") from None


def _refuse_existing(checkpoints: Path, store: RemoteStore | None) -> None:
    existing = [str(folder.name) for folder in list_folders(checkpoints)]
    where: object = checkpoints
    if store is not None and not existing:
        where = store.url
        existing = [found.folder for found in list_checkpoints(store)[0]]
    if existing:
        raise UserError(
            f"checkpoint.resume is none, but {where} holds {existing[-1]}; give another "
            "out_dir (and remote_url) for a fresh start, or checkpoint.resume=auto to continue"
        )


def _batch_keys(saved: Any, new: Any) -> tuple[str, ...]:
    key = "trainer.global_batch_size"
    if _get(saved, key) is None and _get(new, key) is None:
        return ("trainer.micro_batch_size", "trainer.accumulate_grad_batches")
    return (key,)


def _compare(saved: Any, new: Any, path: str, differing: list[str]) -> None:
    if path in FREE_KEYS:
        return
    if isinstance(saved, dict) and isinstance(new, dict):
        for key in saved:
            if key in new:
                _compare(saved[key], new[key], f"{path}.{key}", differing)
    elif saved != new:
        differing.append(f"{path} was {_show(saved)} and is now {_show(new)}")


def _show(value: Any) -> str:
    return json.dumps(value)


def _get(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _plain(config: dict[str, Any]) -> Any:
    # Through JSON, as the saved one has been: tuples become lists.
    return json.loads(json.dumps(config))
