"""Adapter folders: `adapter.safetensors` and an `adapter.json` that says everything needed to use it.

Loading is strict. A missing or surplus tensor, a wrong shape, another base and a non-finite value each stop
with a message that names the thing and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_accel import __version__
from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.errors import UserError, WriteError

TENSORS_FILE = "adapter.safetensors"
META_FILE = "adapter.json"
FORMAT_VERSION = 1
RUN_ONLY = frozenset(("load_path",))
"""Fields of the peft section that belong to a run and not to the adapter."""
TRAINING_ONLY = frozenset(("dropout", "state_prompt", "svd_niter", *RUN_ONLY))
"""Fields that shape the training but not the meaning of the saved tensors: a later run may change them."""


@dataclass(frozen=True)
class AdapterMeta:
    """What an adapter is, beside its tensors."""

    peft: dict[str, Any]
    """The recipe's peft section (method, rank, alpha, targets, quantisation, ...), without `load_path`."""
    base_digest: str
    """checkpoint_digest of the base model; empty when unknown (adapters of other programs)."""
    base_path: str = ""
    """Where the base was, as a hint for the reader."""
    tokenizer: str = ""
    """Tokenizer of the training data."""
    template: str = ""
    """Prompt template of the training data; empty when unknown."""
    trained_tokens: int = 0
    """Tokens processed until this save."""
    step: int = 0
    """Optimizer updates until this save."""
    epoch: int = 0
    """Completed epochs."""
    format_version: int = FORMAT_VERSION
    created_by: str = f"rwkv_accel {__version__}"
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [dtype, shape] of every tensor; filled in by save_adapter."""
    sha256: str = ""
    """Digest of the tensor file; filled in by save_adapter."""

    @property
    def config(self) -> PeftConfig:
        """The peft section as a validated object."""
        return PeftConfig.model_validate(self.peft)


def peft_section(config: PeftConfig) -> dict[str, Any]:
    """The part of a peft section that describes the adapter itself, as JSON types."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in RUN_ONLY}


def save_adapter(folder: str | Path, tensors: Mapping[str, Tensor], meta: AdapterMeta) -> Path:
    """Write an adapter folder in one step: after a crash there is the old folder, the new one, or none.

    Not collective: call it on one process, with whole tensors.

    Raises:
        UserError: a value is not finite, or the folder cannot be written; nothing is left behind.
    """
    from safetensors.torch import save

    folder = Path(folder)
    check_finite(tensors, f"the adapter for {folder}")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(whole, metadata={"format": "pt", "rwkv_accel_format_version": str(FORMAT_VERSION)})
    listed = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(whole.items())}
    record = {**asdict(meta), "tensors": listed, "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_folder(folder, {TENSORS_FILE: data, META_FILE: text.encode()})
    return folder


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of small files under its final name only when all of them are on disk."""
    part = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, data in files.items():
            with open(part / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise WriteError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another folder"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def read_meta(folder: str | Path) -> AdapterMeta:
    """The description of an adapter folder.

    Raises:
        UserError: there is no such folder, or its adapter.json is broken or of a newer format.
    """
    path = Path(folder) / META_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no adapter folder: it has no {META_FILE}; give the folder that a run saved")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        known = {f.name for f in fields(AdapterMeta)}
        surplus = sorted(set(record) - known)
        if version == FORMAT_VERSION and not surplus:
            return AdapterMeta(**record)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); restore it from a backup") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}; update rwkv_accel")
    raise UserError(f"{path} has unknown keys {', '.join(surplus)}; update rwkv_accel")


def read_adapter(folder: str | Path) -> tuple[AdapterMeta, dict[str, Tensor]]:
    """Description and tensors (on the CPU) of an adapter folder, checked against each other.

    Raises:
        UserError: the file is truncated or changed, lacks or adds a tensor, or holds a value that is not
            finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    meta = read_meta(folder)
    path = Path(folder) / TENSORS_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {TENSORS_FILE}: the save is incomplete; use another epoch's folder")
    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}); use another epoch's folder") from None
    check_names(tensors, meta.tensors, str(path), "use another epoch's folder")
    for name, (dtype, shape) in meta.tensors.items():
        found = [str(tensors[name].dtype).removeprefix("torch."), list(tensors[name].shape)]
        if found != [dtype, shape]:
            raise UserError(
                f"{path}: {name} is {found}, {META_FILE} says {[dtype, shape]}; they do not belong together"
            )
    if hashlib.sha256(data).hexdigest() != meta.sha256:
        raise UserError(f"{path} was changed after it was saved (its sha256 differs); use another epoch's folder")
    check_finite(tensors, str(path))
    return meta, tensors


def check_base(meta: AdapterMeta, base_digest: str, folder: str | Path, base: str | Path) -> None:
    """Raises UserError unless the adapter was trained on the base with this digest."""
    if meta.base_digest and meta.base_digest != base_digest:
        hint = f" (it was at {meta.base_path})" if meta.base_path else ""
        raise UserError(
            f"adapter {folder} was trained on another base than {base}: digest {meta.base_digest[:19]}..., "
            f"this one has {base_digest[:19]}...; give the right base model{hint}"
        )


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: str, remedy: str) -> None:
    """Raises UserError naming the first missing or surplus tensor, with the remedy."""
    missing, surplus = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for words, names in (("lacks", missing), ("has an unexpected", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where} {words} tensor {names[0]}{more}; {remedy}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds NaN or infinity; the run diverged, go back to an earlier save")
