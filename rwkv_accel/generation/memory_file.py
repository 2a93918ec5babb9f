"""Conversation memory on disk: go on later without reading the conversation again.

One safetensors file in the layout of model/state.py: `blocks.i.att.shift` [C], `blocks.i.att.wkv` [H, value, key],
`blocks.i.ffn.shift` [C], and the tokens not fed yet.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import Memory
from rwkv_accel.model.rwkv7 import RWKV7
from rwkv_accel.model.state import RWKV7State

FORMAT = "rwkv_accel.memory.1"
PENDING = "pending_ids"


def save_memory(memory: Memory, path: str | Path, *, model_id: str) -> None:
    """Write a memory atomically. `model_id` says which weights it belongs to (see loading.model_id).

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {PENDING: torch.tensor(memory.pending_ids, dtype=torch.int64)}
    for name, tensor in zip(_names(len(memory.state.wkv)), memory.state.to_flat()):
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    data = save(tensors, metadata={"format": FORMAT, "model": model_id})
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file") from None


def load_memory(path: str | Path, model: RWKV7, *, model_id: str) -> Memory:
    """Memory of a file for this model, on its device.

    Raises:
        UserError: the file is missing, damaged, no memory, or belongs to other weights.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"memory {path} does not exist; leave it out to begin a conversation")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no memory file ({error}); begin a new conversation") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no memory file of this program (format {json.dumps(metadata.get('format'))})")
    if metadata.get("model") != model_id:
        raise UserError(f"memory {path} belongs to other weights than these; give the model it was made with")
    device = model.ln_out.weight.device
    flat = [tensors[name] for name in _names(model.config.n_layer)]
    return Memory(RWKV7State.from_flat(flat).to(device), tuple(tensors[PENDING].tolist()))


def _names(n_layer: int) -> list[str]:
    parts = ("att.shift", "att.wkv", "ffn.shift")
    return [f"blocks.{layer}.{part}" for layer in range(n_layer) for part in parts]
