"""What a new start continues from, and whether it may."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_accel.checkpoint.collective import on_main
from rwkv_accel.checkpoint.format import (
    CHECKPOINTS_DIR,
    STATE_FILE,
    DamagedCheckpoint,
    Manifest,
    age_key,
    list_folders,
    read_document,
    read_manifest,
    validate,
)
from rwkv_accel.errors import UserError

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
)
FREE_KEYS = frozenset(
    {
        "model.path",  # the base is known by its digest, wherever it lies
        "model.wkv_backend",  # the same maths on another device
        "data.on_bad_line",
    }
)
LENGTH_KEYS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_tokens")


def find_resume(out_dir: str | Path, resume: str) -> Path | None:
    """The checkpoint that a start continues from, every byte of it checked, or None for a fresh start.

    Args:
        resume: `auto` takes the newest complete checkpoint and names the damaged ones it skips; `none`
            refuses a folder that has a checkpoint; anything else is the path of a checkpoint folder.

    Raises:
        UserError: the path is no usable checkpoint, all of them are damaged, or `none` met a checkpoint.
    """
    checkpoints = Path(out_dir) / CHECKPOINTS_DIR
    if resume == "auto":
        return _newest(checkpoints)
    if resume == "none":
        existing = list_folders(checkpoints)
        if existing:
            raise UserError(
                f"checkpoint.resume is none, but {checkpoints} holds {existing[-1].name}; give another "
                "out_dir for a fresh start, or checkpoint.resume=auto to continue"
            )
        return None
    try:
        validate(Path(resume), deep=True)
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}; give another checkpoint.resume=<path>, or auto for the newest good one") from None
    return Path(resume)


def find_resume_on_all(accelerator: Accelerator, out_dir: str | Path, resume: str) -> Path | None:
    """find_resume on the main process, the answer or the error on every rank. Collective.

    Ranks that looked for themselves could differ (a network disk shows a rename late) and wait for ever.
    """
    return on_main(accelerator, lambda: find_resume(out_dir, resume))


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: state, extra, config, base_digest, world_size, optimizer."""
    return read_document(folder, STATE_FILE)


def check_same_run(saved_config: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse to continue a run under a recipe that contradicts it; another length of the run is announced.

    Both are dumps of RunConfig, with the rows per update in trainer.global_batch_size where they follow from
    other keys. Keys that only one side knows come from another version of the schema and are not compared.

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
            f"the recipe contradicts the checkpoint: {'; '.join(differing)}. Put the old values back to "
            "continue, or give another out_dir for a new run"
        )
    for key in LENGTH_KEYS:
        old, now = _get(saved, key), _get(new, key)
        if old != now:
            logger.warning("%s was %s and is now %s: the schedule is stretched", key, _show(old), _show(now))


def _newest(checkpoints: Path) -> Path | None:
    damaged: list[str] = []
    readable: list[tuple[Path, Manifest]] = []
    for folder in list_folders(checkpoints):
        try:
            readable.append((folder, read_manifest(folder)))
        except DamagedCheckpoint as damage:
            damaged.append(str(damage))
    for folder, _ in sorted(readable, key=lambda item: age_key(*item), reverse=True):
        try:
            validate(folder, deep=True)
        except DamagedCheckpoint as damage:
            damaged.append(str(damage))
            continue
        for message in damaged:
            logger.warning("%s; skipped", message)
        return folder
    if damaged:
        raise UserError(
            f"no usable checkpoint: {'; '.join(damaged)}. Bring back an intact copy, or give another out_dir "
            "for a fresh start"
        )
    return None


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
