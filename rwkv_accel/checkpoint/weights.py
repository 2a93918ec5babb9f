"""The save that people carry away: the adapter of a PEFT run, or the whole model of a full fine-tuning.

out_dir/adapter/<name>/ holds `adapter.safetensors` + `adapter.json`, or `model.pth`; out_dir/adapter/LATEST names the
newest complete one. out_dir/best/ has the same content for the lowest validation loss.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rwkv_accel.checkpoint.collective import on_main
from rwkv_accel.checkpoint.format import sync
from rwkv_accel.checkpoint.retention import prune_weights
from rwkv_accel.checkpoint.strategy import layout_of, trained_parameters
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.errors import UserError, WriteError
from rwkv_accel.model.io import read_checkpoint, save_checkpoint
from rwkv_accel.peft.adapter_file import META_FILE, AdapterMeta, peft_section, save_adapter
from rwkv_accel.peft.apply import adapter_buffers
from rwkv_accel.runtime import unwrap
from rwkv_accel.state import TrainState
from rwkv_accel.tracking import RUN_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS_DIR = "adapter"
BEST_DIR = "best"
LATEST_FILE = "LATEST"
"""The resolved recipe in a run folder."""
INIT_FILE = "rwkv-init.pth"
"""The start weights in the folder of a run that made its own."""
MODEL_FILE = "model.pth"


def save_weights(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    *,
    config: RunConfig,
    state: TrainState,
    folder: Path,
    base_path: str,
    base_digest: str,
) -> Path:
    """Write a folder with what the run trains, whole, whatever the strategy. Collective.

    A PEFT run leaves an adapter folder without any base tensor; full fine-tuning leaves a checkpoint in the base's
    dtype.

    Raises:
        WriteError: on every rank: the folder cannot be written.
        UserError: on every rank: a value is not finite.
    """
    named = trained_parameters(accelerator, model)
    values = layout_of(accelerator, model, optimizer).gather([(param, None) for param in named.values()])
    trained = {key: value for key, value in zip(named, values) if value is not None}
    buffers = adapter_buffers(unwrap(model))

    def write() -> None:
        try:
            if config.peft.method == "full":
                _save_full(folder / MODEL_FILE, trained, base_path)
            else:
                meta = AdapterMeta(
                    peft=peft_section(config.peft),
                    base_digest=base_digest,
                    base_path=base_path,
                    tokenizer=config.data.tokenizer,
                    template=config.data.template,
                    trained_tokens=state.tokens_seen,
                    step=state.step,
                    epoch=state.epoch,
                )
                save_adapter(folder, {**trained, **buffers}, meta)
            if folder.parent.name == WEIGHTS_DIR:
                pointer = folder.parent / LATEST_FILE
                part = pointer.with_name(LATEST_FILE + ".tmp")
                part.write_text(folder.name + "\n", encoding="utf-8")
                sync(part)
                os.replace(part, pointer)
                prune_weights(folder.parent, config.checkpoint.keep_weights, folder.name)
        except OSError as error:
            raise WriteError(f"cannot save {folder}: {error.strerror}; free space or change the permissions") from None

    on_main(accelerator, write)
    return folder


def has_weights(out_dir: str | Path) -> bool:
    """Whether the newest save of a run is there."""
    return _newest(out_dir) is not None


def latest_weights(out_dir: str | Path) -> Path:
    """Folder of the newest save of a run.

    Raises:
        UserError: the run has saved nothing yet, or what it saved last is gone.
    """
    folder = _newest(out_dir)
    if folder is not None:
        return folder
    pointer = Path(out_dir) / WEIGHTS_DIR / LATEST_FILE
    if not pointer.is_file():
        raise UserError(f"{out_dir} holds no saved weights ({pointer} is missing); let its run finish first")
    others = ", ".join(sorted(str(path) for path in pointer.parent.iterdir() if path.is_dir())) or "none"
    raise UserError(f"{pointer} names no save that is there; saves there are: {others}")


def _newest(out_dir: str | Path) -> Path | None:
    pointer = Path(out_dir) / WEIGHTS_DIR / LATEST_FILE
    name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    folder = pointer.parent / name
    return folder if name and folder.is_dir() else None


def run_folder_of(save: str | Path) -> Path | None:
    """The run folder that a save (out_dir/adapter/<name> or out_dir/best) lies in; None if it stands alone."""
    save = Path(save).resolve()
    depth = 0 if save.name == BEST_DIR else 1
    folder = save.parents[depth] if len(save.parents) > depth else save
    return folder if (folder / RUN_FILE).is_file() else None


def base_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a `model.path` means: the file itself, or the newest save of a full run's out_dir.

    Raises:
        UserError: the folder's run saved an adapter, which has to be merged first.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = latest_weights(path)
    if (folder / META_FILE).is_file():
        raise UserError(
            f"model.path {path} is the run of an adapter; merge it (python -m rwkv_accel.export {path} --to pth) and "
            "give the merged file, or continue the adapter itself with peft.load_path"
        )
    return folder / MODEL_FILE


def _save_full(path: Path, trained: dict[str, Tensor], base_path: str) -> None:
    base = read_checkpoint(base_path)
    # Names that never train (unused layer-0 matrices) travel along, so that the file has what the base had.
    whole = {name: trained.get(name, base[name]).to(base[name].dtype) for name in base}
    save_checkpoint(whole, path)
