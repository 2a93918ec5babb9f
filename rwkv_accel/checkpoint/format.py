"""The checkpoint folder on disk: written whole or not at all, and checked byte by byte before it is trusted.

    step-00001200/
        trainable.safetensors    trained parameters, at the precision of the optimizer's master copy
        optimizer.safetensors    optimizer moments, `exp_avg/<parameter>`
        extra.safetensors        tensors of the caller (only when there are any)
        rng.json                 random number generators of every rank
        state.json               counters, config, base digest, log offsets
        manifest.json            size and sha256 of every other file; written last

Everything goes into `<name>.tmp`, is fsynced, and gets its final name by one rename. A folder under a final
name with a manifest that fits its files is complete; nothing else is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rwkv_accel.errors import UserError, WriteError

FORMAT = "rwkv_accel-checkpoint"
VERSION = 1
CHECKPOINTS_DIR = "checkpoints"
STEP_PREFIX = "step-"
INTERRUPTED = "INTERRUPTED"
"""Name of the checkpoint that a signal asked for."""
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
RNG_FILE = "rng.json"
TRAINABLE_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EXTRA_FILE = "extra.safetensors"
TMP_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"
HASH_CHUNK_BYTES = 1 << 22

# Folders of others that may lie where a checkpoint is looked for, by a file that only they have.
FOREIGN_FILES = {
    "trainer_state.json": "a checkpoint of the Hugging Face Trainer",
    "**/*_optim_states.pt": "a checkpoint of DeepSpeed",
    "**/*_model_states.pt": "a checkpoint of DeepSpeed",
    "*.ckpt": "a checkpoint of Lightning",
    ".metadata": "a checkpoint of torch.distributed.checkpoint",
    "adapter_config.json": "an adapter of HF peft",
    "*.safetensors": "a folder of bare weights",
    "*.bin": "a folder of bare weights",
    "*.pth": "a folder of bare weights",
}
USE_WEIGHTS = "to start a new run from weights give model.path or peft.load_path"


class DamagedCheckpoint(UserError):
    """A checkpoint folder that must not be loaded: a file is missing, cut off or altered."""


class CheckpointWriteError(WriteError):
    """A checkpoint could not be written (disk full, no permission). Older ones are untouched."""


@dataclass(frozen=True)
class Manifest:
    """What a complete folder says about itself."""

    step: int
    """Optimizer updates done."""
    sequence: int
    """Order of writing within a run folder; survives clocks that disagree and a return to an older step."""
    files: dict[str, tuple[int, str]]
    """Bytes and sha256 of each file."""


def write_folder(
    final: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, str],
    after: int = 0,
) -> None:
    """Write a checkpoint folder; a kill at any moment leaves no folder of this name or a complete one.

    Args:
        final: folder to create; an existing one is replaced, and kept until the new one is complete.
        tensors: CPU tensors of each .safetensors file.
        documents: text of each .json file.
        after: sequence number of a checkpoint elsewhere that this one is newer than.

    Raises:
        CheckpointWriteError: the disk refused; the half-written folder is removed again.
    """
    tmp = final.with_name(final.name + TMP_SUFFIX)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        for name, content in tensors.items():
            save_file({key: value.contiguous() for key, value in content.items()}, tmp / name)
        for name, document in documents.items():
            (tmp / name).write_text(document, encoding="utf-8")
        names = [*tensors, *documents]
        for name in names:
            sync(tmp / name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "sequence": 1 + max(after, _newest_sequence(final.parent)),
            "files": {name: {"bytes": (tmp / name).stat().st_size, "sha256": sha256_of(tmp / name)} for name in names},
        }
        (tmp / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        sync(tmp / MANIFEST_FILE)
        sync(tmp)
        give_final_name(tmp, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise CheckpointWriteError(
            f"checkpoint {final} could not be written: {_reason(error)}; free some space or mend the folder's "
            "permissions (checkpoints written before are intact)"
        ) from error


def _reason(error: OSError | SafetensorError) -> str:
    """What the operating system said; safetensors wraps it into words of its own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    wrapped = re.search(r"([^:]+) \(os error \d+\)", str(error))
    return wrapped[1].strip() if wrapped else str(error)


def validate(folder: Path, *, deep: bool) -> Manifest:
    """Check that a folder is a complete checkpoint: the files' sizes, with `deep` every byte of them.

    Raises:
        DamagedCheckpoint: something is missing, cut off or altered; the message names the file.
        UserError: the folder does not exist, or a newer version of this trainer wrote it.
    """
    manifest = read_manifest(folder)
    for name, (num_bytes, sha256) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} is missing")
        found = path.stat().st_size
        if found != num_bytes:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} has {found} bytes instead of {num_bytes}")
        if deep and sha256_of(path) != sha256:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: the bytes of {name} do not fit its checksum")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, without a look at the other files. Errors as in validate."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, and a checkpoint of this trainer is a folder; {USE_WEIGHTS}")
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} does not exist; give a folder such as out_dir/checkpoints/step-00001200")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        foreign = _foreign_kind(folder)
        if foreign is not None:
            raise DamagedCheckpoint(f"{folder} is {foreign}, not a checkpoint of this trainer; {USE_WEIGHTS}")
        raise DamagedCheckpoint(f"{folder} has no {MANIFEST_FILE}: it is not a complete checkpoint of this trainer")
    return parse_manifest(path.read_bytes(), folder)


def _foreign_kind(folder: Path) -> str | None:
    """What a folder without a manifest is, by what lies in it; None if it may be ours or nothing tells."""
    if (folder / TRAINABLE_FILE).exists():
        return None
    return next((kind for pattern, kind in FOREIGN_FILES.items() if any(folder.glob(pattern))), None)


def parse_manifest(data: bytes, folder: object) -> Manifest:
    """The manifest from the bytes of its file; `folder` is for the messages. Errors as in validate."""
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise DamagedCheckpoint(f"{folder} is not a checkpoint of this trainer (format {content['format']!r})")
        if content["version"] != VERSION:
            raise UserError(
                f"checkpoint {folder} has format version {content['version']}, this program reads {VERSION}; "
                "continue with the version of rwkv_accel that wrote it"
            )
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        return Manifest(int(content["step"]), int(content["sequence"]), files)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST_FILE} is not readable ({error})") from None


def read_document(folder: Path, name: str) -> Any:
    """The content of one .json file of a validated folder."""
    return json.loads((folder / name).read_bytes())


class TensorFile(Mapping[str, Tensor]):
    """The tensors of one .safetensors file, each read when it is asked for: one at a time is in memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = safe_open(folder / name, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())


def step_name(step: int) -> str:
    """Folder name of what is saved after this many updates."""
    return f"{STEP_PREFIX}{step:08d}"


def list_folders(checkpoints: Path) -> list[Path]:
    """All folders under final names, complete or not, by name."""
    if not checkpoints.is_dir():
        return []
    return sorted(p for p in checkpoints.iterdir() if p.is_dir() and not p.name.endswith(TMP_SUFFIX))


def list_complete(checkpoints: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints by file sizes (bytes are not read), oldest first; damaged ones are left out."""
    found = []
    for folder in list_folders(checkpoints):
        try:
            found.append((folder, validate(folder, deep=False)))
        except UserError:
            continue
    return sorted(found, key=lambda item: age_key(*item))


def age_key(folder: Path, manifest: Manifest) -> tuple[int, int, bool]:
    """Sort key: later written is larger. A folder being replaced is older than its successor."""
    return manifest.sequence, manifest.step, not folder.name.endswith(REPLACED_SUFFIX)


def give_final_name(tmp: Path, final: Path) -> None:
    """Put a finished folder under its name; at each moment the old one or the new one is found."""
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    if final.exists():
        # Between these two renames the old one is still found, under its other name.
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(tmp, final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _newest_sequence(checkpoints: Path) -> int:
    sequences = [0]
    for folder in list_folders(checkpoints):
        try:
            sequences.append(read_manifest(folder).sequence)
        except UserError:
            continue
    return max(sequences)


def sync(path: Path) -> None:
    """Make a file, or the renames and removals in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Digest of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
