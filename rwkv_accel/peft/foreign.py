"""Adapters of other programs: flat .pth files of RWKV-PEFT (until 2025), and the one door to all formats.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.peft.adapter_file import META_FILE, AdapterMeta, check_finite, peft_section, read_adapter
from rwkv_accel.peft.describe import describe_tensors
from rwkv_accel.peft.hf_peft import HF_CONFIG_FILE, read_hf_peft

FOREIGN = "another program"
FOREIGN_IDENTITY = ("method", "alpha", "rslora", "miss_variant")
"""Settings that an adapter of another program and a recipe must share."""
PISSA_INIT_FILE = "init_pissa.pth"


def read_any_adapter(
    path: str | Path, *, method: str | None = None, alpha: float | None = None
) -> tuple[AdapterMeta, dict[str, Tensor]]:
    """Description and tensors of an adapter folder, an HF PEFT folder, or a flat .pth of RWKV-PEFT or a
    state.

    `method` and `alpha` fill in what a flat .pth does not say; PiSSA's A0, B0 are read from
    `init_pissa.pth` beside it.

    Raises:
        UserError: the path is none of these, is damaged, or lacks what is needed to use it.
    """
    path = Path(path)
    if (path / META_FILE).is_file():
        return read_adapter(path)
    if (path / HF_CONFIG_FILE).is_file():
        peft, tensors = read_hf_peft(path)
        origin = "HF PEFT"
    elif path.is_file() and path.suffix == ".pth":
        peft, tensors = read_flat_pth(path, method=method, alpha=alpha)
        origin = "flat .pth"
    else:
        raise UserError(
            f"{path} is no adapter: expected a folder with {META_FILE} or {HF_CONFIG_FILE}, or a .pth file; "
            "give the folder that a run saved"
        )
    check_finite(tensors, str(path))
    return AdapterMeta(peft_section(peft), "", created_by=f"{FOREIGN}: {origin}"), tensors


def read_flat_pth(
    path: Path, *, method: str | None = None, alpha: float | None = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Peft section and tensors, in this project's names, of an adapter that says nothing about itself.

    RWKV-PEFT's LoRA and PiSSA (lora_A, lora_B), Bone / DiSHA (bone, disha; 3-D is its "bat"), time_state, and
    trained base parameters.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_pth(path).items():
        owner, _, last = name.removeprefix("model.").rpartition(".")
        tensors[f"{owner}.miss_D" if last in ("bone", "disha") else f"{owner}.{last}"] = tensor
    kinds = {name.rsplit(".", 1)[-1] for name in tensors}
    fields: dict[str, Any] = {}
    if "miss_D" in kinds:
        dims = {tensor.dim() for name, tensor in tensors.items() if name.endswith("miss_D")}
        fields = {"method": "miss", "miss_variant": "plain" if dims == {2} else "bat_in"}
    elif "lora_A" in kinds:
        fields = {"method": "pissa" if method == "pissa" else "lora", "alpha": alpha}
        if method == "pissa":
            tensors |= _pissa_init(path)
        elif alpha is None:
            raise UserError(
                f"{path} does not say its alpha; set peft.alpha (export: --alpha) to the lora_alpha of its training"
            )
    elif kinds == {"time_state"}:
        fields = {"method": "state"}
    else:
        raise UserError(
            f"{path} holds no adapter (no lora_A, bone, disha or time_state); give an adapter file, or use it as "
            "model.path if it is a whole model"
        )
    return PeftConfig.model_validate(fields | describe_tensors(tensors, fields["method"])), tensors


def load_pth(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth by name. Raises UserError for anything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read ({reason}); the file is truncated or no .pth, copy it again") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} is no dictionary of tensors; give an adapter .pth")
    return loaded


def _pissa_init(path: Path) -> dict[str, Tensor]:
    init_path = path.with_name(PISSA_INIT_FILE)
    if not init_path.is_file():
        raise UserError(f"{path} needs {init_path}: a PiSSA adapter cannot be used without its start; put it there")
    return {name.removeprefix("model."): tensor for name, tensor in load_pth(init_path).items()}
