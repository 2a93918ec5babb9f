"""What is in a file or folder, as an ordered dict of facts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv_accel.checkpoint.format import MANIFEST_FILE, STATE_FILE, read_document, validate
from rwkv_accel.checkpoint.weights import latest_weights
from rwkv_accel.errors import UserError
from rwkv_accel.model.checkpoint_file import Checkpoint
from rwkv_accel.model.io import checkpoint_digest, read_checkpoint
from rwkv_accel.peft.adapter_file import META_FILE, AdapterMeta, read_adapter
from rwkv_accel.peft.foreign import read_any_adapter
from rwkv_accel.peft.hf_peft import HF_CONFIG_FILE
from rwkv_accel.tracking import RUN_FILE

Facts = dict[str, Any]


def facts_about(path: str | Path, *, digest: bool = False) -> Facts:
    """What a path is: `kind` first, then what matters for that kind. Adapters are read and checked whole.

    Raises:
        UserError: nothing that this project knows, or damaged.
    """
    path = Path(path)
    if path.is_file():
        return _file(path, digest)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a checkpoint, an adapter folder or a run folder")
    for marker, describe in (
        (META_FILE, _adapter),
        (HF_CONFIG_FILE, _hf_adapter),
        (MANIFEST_FILE, _resume),
        (RUN_FILE, _run),
    ):
        if (path / marker).is_file():
            return describe(path)
    if (path / "model.pth").is_file():
        return _file(path / "model.pth", digest)
    if (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        return _fla(path)
    raise UserError(
        f"{path} is no run, save, adapter or model folder (none of {RUN_FILE}, {META_FILE}, {HF_CONFIG_FILE}, "
        f"{MANIFEST_FILE}, config.json is in it); give one of these"
    )


def _file(path: Path, digest: bool) -> Facts:
    checkpoint = read_checkpoint(path)
    names = list(checkpoint.shapes)
    if "emb.weight" in names and "blocks.0.att.r_k" in names:
        return _model(checkpoint, digest)
    if all(name.endswith(".time_state") for name in names):
        heads = next(iter(checkpoint.shapes.values()))
        return {"kind": "initial WKV states (state tuning)", "blocks": len(names), "heads x value x key": list(heads)}
    if any(name.endswith((".lora_A", ".bone", ".disha")) for name in names):
        # The file has no alpha; any value lets the rest be read.
        meta, tensors = read_any_adapter(path, alpha=1.0)
        peft = {**meta.peft, "alpha": "not in the file"}
        return {"kind": "flat adapter of RWKV-PEFT", **_peft_facts(peft), **_tensor_facts(tensors)}
    checkpoint.config  # noqa: B018  (raises with what the file is)
    raise AssertionError("a file with all names of a model is a model")


def _model(checkpoint: Checkpoint, digest: bool) -> Facts:
    config = checkpoint.config
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    dtypes = Counter(str(checkpoint[name].dtype).removeprefix("torch.") for name in sizes)
    facts: Facts = {
        "kind": "RWKV-7 (x070) model",
        "layers": config.n_layer,
        "channels": config.n_embd,
        "heads": f"{config.n_head} of {config.head_size}",
        "vocabulary": config.vocab_size,
        "ffn width": config.dim_ffn,
        "inner ranks": f"decay {config.decay_rank}, iclr {config.iclr_rank}, "
        f"value {config.value_rank}, gate {config.gate_rank}",
        "parameters": f"{sum(sizes.values()):,}",
        "dtypes": ", ".join(f"{name} x {count}" for name, count in dtypes.most_common()),
        "layer-0 value matrices": "present, unused" if config.has_layer0_value else "absent",
    }
    if any(name.endswith(".time_state") for name in sizes):
        facts["time_state"] = "present: sequences do not start from zero"
    if digest:
        facts["digest"] = checkpoint_digest(checkpoint.path)
    return facts


def _adapter(path: Path) -> Facts:
    meta, tensors = read_adapter(path)
    return {
        "kind": "adapter, complete and undamaged",
        **_peft_facts(meta.peft),
        **_origin(meta),
        **_tensor_facts(tensors),
    }


def _hf_adapter(path: Path) -> Facts:
    meta, tensors = read_any_adapter(path)
    return {"kind": "HF PEFT adapter", **_peft_facts(meta.peft), **_tensor_facts(tensors)}


def _resume(path: Path) -> Facts:
    manifest = validate(path, deep=True)
    state = read_document(path, STATE_FILE)
    return {
        "kind": "resume checkpoint, complete and undamaged",
        "step": manifest.step,
        "files": ", ".join(f"{name} {size:,} bytes" for name, (size, _) in manifest.files.items()),
        "base": str(state.get("base_digest", ""))[:19],
    }


def _run(path: Path) -> Facts:
    checkpoints = sorted(p.name for p in (path / "checkpoints").glob("*") if (p / MANIFEST_FILE).is_file())
    facts: Facts = {"kind": "run folder", "resume checkpoints": ", ".join(checkpoints) or "none"}
    try:
        newest = latest_weights(path)
    except UserError:
        return facts | {"newest save": "none yet"}
    return facts | {"newest save": str(newest)} | {f"save {key}": value for key, value in facts_about(newest).items()}


def _fla(path: Path) -> Facts:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    keys = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "eos_token_id", "torch_dtype")
    return {"kind": "Hugging Face model folder", **{key: config.get(key) for key in keys}}


def _peft_facts(peft: Mapping[str, Any]) -> Facts:
    """The peft section without what is off or empty."""
    off: tuple[Any, ...] = (None, False, "none", "plain", 0, 0.0, [], (), {})
    kept = {key: value for key, value in peft.items() if key == "alpha" or value not in off}
    for key in ("targets", "train_patterns", "train_parts"):
        if key in kept:
            shown = [str(value) for value in kept[key]]
            more = f", ... ({len(shown)})" if len(shown) > 8 else ""
            kept[key] = ", ".join(shown[:8]) + more
    if peft.get("method") in ("state", "parts", "full"):
        for key in ("rank", "alpha", "targets"):
            kept.pop(key, None)
    return kept


def _origin(meta: AdapterMeta) -> Facts:
    return {
        "base": f"{meta.base_path or 'unknown path'} ({meta.base_digest[:19]}...)",
        "tokenizer": meta.tokenizer or "unknown",
        "template": meta.template or "unknown",
        "trained": f"{meta.trained_tokens:,} tokens, {meta.step:,} steps, {meta.epoch} epochs",
        "written by": f"{meta.created_by}, format {meta.format_version}",
    }


def _tensor_facts(tensors: Mapping[str, torch.Tensor]) -> Facts:
    count = sum(t.numel() for t in tensors.values())
    return {"tensors": f"{len(tensors)} with {count:,} values"}
