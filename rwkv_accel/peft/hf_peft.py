"""HF PEFT adapter folders, read and written: LoRA, rsLoRA, DoRA, MiSS; PiSSA as an exact LoRA of rank 2R.

Shapes: R rank, I in_features, O out_features. Module paths are the official ones, or those of the fla format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.config.schema import PeftConfig
from rwkv_accel.errors import UserError
from rwkv_accel.peft.adapter_file import write_folder
from rwkv_accel.peft.base import AdapterSpec
from rwkv_accel.peft.describe import describe_tensors
from rwkv_accel.peft.fla import from_fla_module, to_fla_name

HF_CONFIG_FILE = "adapter_config.json"
HF_TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_m",
    "miss_block": "miss_D",
    "bone_block": "miss_D",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items() if theirs != "bone_block"}
# Settings whose value changes what the tensors mean, in a way that this reader does not follow.
_MUST_BE_OFF = ("fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication", "use_qalora", "exclude_modules")


def write_hf_peft(
    folder: Path,
    peft: PeftConfig,
    specs: Mapping[str, AdapterSpec],
    tensors: Mapping[str, Tensor],
    *,
    names: str,
    base: str,
) -> None:
    """Write an HF PEFT folder, complete or not at all. `names`: official or fla module paths.

    Raises:
        UserError: the adapter trains something that HF PEFT cannot express.
    """
    from safetensors.torch import save

    if peft.method == "miss" and peft.miss_variant == "bat_in":
        raise UserError("HF PEFT has no bat with one matrix per input block; export the merged model (--to pth)")
    rest = [name for name in tensors if name.rsplit(".", 1)[0] not in specs]
    if rest or not specs:
        what = f"it also trains {rest[0]}" if rest else f"method {peft.method} has no adapter layers"
        raise UserError(f"HF PEFT folders hold adapters only, and {what}; export the merged model (--to pth)")
    written: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, spec in specs.items():
        path = to_fla_name(module) if names == "fla" else module
        assert path is not None, module
        own = {name.rsplit(".", 1)[1]: t for name, t in tensors.items() if name.rsplit(".", 1)[0] == module}
        if peft.method == "pissa":
            own, spec = pissa_as_lora(own, spec)
        ranks[path] = spec.rank
        alphas[path] = spec.alpha if spec.alpha is not None else spec.scale * spec.rank
        for name, tensor in own.items():
            written[f"{_PREFIX}{path}.{_THEIRS[name]}"] = tensor.detach().contiguous()
    config = _hf_config(peft, ranks, alphas, base)
    write_folder(
        folder,
        {
            HF_TENSORS_FILE: save(written, metadata={"format": "pt"}),
            HF_CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        },
    )


def pissa_as_lora(own: Mapping[str, Tensor], spec: AdapterSpec) -> tuple[dict[str, Tensor], AdapterSpec]:
    """W + s (B A - B0 A0) as a LoRA on the whole W: A' = [A; A0] [2R, I], B' = [B, -B0] [O, 2R], the same
    scale.
    """
    lora_A = torch.cat([own["lora_A"], own["init_lora_A"].to(own["lora_A"])], dim=0)
    lora_B = torch.cat([own["lora_B"], -own["init_lora_B"].to(own["lora_B"])], dim=1)
    rank = 2 * spec.rank
    alpha = spec.scale * (rank**0.5 if spec.rslora else rank)
    return {"lora_A": lora_A, "lora_B": lora_B}, AdapterSpec(rank, alpha, spec.rslora)


def _hf_config(peft: PeftConfig, ranks: dict[str, int], alphas: dict[str, float], base: str) -> dict[str, Any]:
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    common: dict[str, Any] = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "target_modules": sorted(ranks),
        "task_type": None,
        "bias": "none",
        "modules_to_save": None,
    }
    if peft.method == "miss":
        if set(ranks.values()) != {rank}:
            raise UserError("HF PEFT's MiSS has one rank for all layers; export the merged model (--to pth)")
        variant = "bat" if peft.miss_variant == "bat" else True
        return common | {"peft_type": "MISS", "miss_dropout": peft.dropout, "init_weights": variant}
    return common | {
        "peft_type": "LORA",
        "lora_alpha": alpha,
        "lora_dropout": peft.dropout,
        "use_rslora": peft.rslora,
        "use_dora": peft.method == "dora",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        # Keys are regular expressions there, matched at the end of a module's path.
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }


def read_hf_peft(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Peft section and tensors, in this project's names, of an HF PEFT folder with official or fla module
    paths.

    Raises:
        UserError: a method or setting that cannot be read, or a damaged folder.
    """
    config = _read_config(folder)
    tensors: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(folder).items():
        theirs = next((name for name in _OURS if key.endswith("." + name)), None)
        if theirs is None or not key.startswith(_PREFIX):
            raise UserError(f"{folder}: tensor {key} is none of LoRA, DoRA or MiSS; merge this adapter with HF peft")
        module = from_fla_module(key[len(_PREFIX) : -len(theirs) - 1])
        tensors[f"{module}.{_OURS[theirs]}"] = tensor
    if config["peft_type"] in ("MISS", "BONE"):
        return _miss_section(folder, config, tensors), tensors
    method = "dora" if config.get("use_dora") else "lora"
    alpha, rslora = float(config["lora_alpha"]), bool(config.get("use_rslora"))
    fields = describe_tensors(tensors, method)
    _fold_alphas(config, tensors, alpha)
    return PeftConfig.model_validate(fields | {"method": method, "alpha": alpha, "rslora": rslora}), tensors


def _fold_alphas(config: Mapping[str, Any], tensors: dict[str, Tensor], alpha: float) -> None:
    """Multiply B where a layer has an alpha of its own: here all layers share one."""
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        for name in [name for name in tensors if name.endswith(".lora_B")]:
            module = name.rsplit(".", 1)[0]
            paths = (module, to_fla_name(module) or module)
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                tensors[name] = tensors[name] * (own / alpha)


def _miss_section(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> PeftConfig:
    variant = config.get("init_weights", True)
    if variant == "mini":
        raise UserError(f"{folder}: MiSS with init_weights 'mini' cannot be read; merge this adapter with HF peft")
    fields = {"method": "miss", "miss_variant": "bat" if variant == "bat" else "plain"}
    return PeftConfig.model_validate(describe_tensors(tensors, "miss") | fields)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / HF_CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); copy the folder again") from None
    if kind not in ("LORA", "MISS", "BONE"):
        raise UserError(f"{path}: peft_type {kind} cannot be read, only LORA and MISS; merge it with HF peft")
    for key in _MUST_BE_OFF:
        if config.get(key):
            raise UserError(f"{path}: {key} {config[key]!r} cannot be read; merge this adapter with HF peft")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {config['bias']!r} cannot be read; merge this adapter with HF peft")
    if str(config.get("init_lora_weights", True)).startswith(("pissa", "olora", "corda", "loftq")):
        raise UserError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changed the base; save the adapter in HF peft "
            "with path_initial_model_for_weight_conversion"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / HF_TENSORS_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {HF_TENSORS_FILE}; save the adapter with safe_serialization")
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy the folder again") from None
