"""Names of the flash-linear-attention / Hugging Face `rwkv7` format (fla/utils/convert_from_rwkv7.py), both
ways.

Shapes: C channels, R inner rank. The format transposes the low-rank matrices, squeezes the vectors that are
biases there, and has no value matrices in layer 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_accel.model.config import RWKV7Config

_LINEARS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_OUTER = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
    "head": "lm_head",
}
_NORMS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}


def to_fla_name(name: str) -> str | None:
    """Name in the fla format of an official parameter or linear module; None where that format has no
    place.
    """
    if name in _OUTER:
        return _OUTER[name]
    found = _BLOCK.match(name)
    if found is None:
        return None
    block, rest = found.groups()
    if block == "0" and rest in ("att.v0", "att.v1", "att.v2"):
        return None
    inner = _inner(rest)
    return None if inner is None else f"model.layers.{block}.{inner}"


def _inner(rest: str) -> str | None:
    owner, _, last = rest.rpartition(".")
    if owner in _NORMS:
        return f"{_NORMS[owner]}.{last}"
    if rest.startswith("ffn."):
        return rest
    pieces = rest.split(".")
    if pieces[0] != "att" or len(pieces) < 2:
        return None
    if pieces[1] in _LINEARS:
        return ".".join(["attn", _LINEARS[pieces[1]], *pieces[2:]])
    letter, digit = pieces[1][0], pieces[1][1:]
    if digit in ("0", "1", "2") and letter in "wavg":
        place = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[digit]
        return f"attn.{letter}_lora.lora.{place}"
    return f"attn.{pieces[1]}" if pieces[1] != "time_state" else None


def from_fla_module(name: str) -> str:
    """Official name of a linear module given in either naming."""
    if name == "lm_head":
        return "head"
    name = re.sub(r"^model\.layers\.(\d+)\.", r"blocks.\1.", name)
    for official, theirs in _LINEARS.items():
        name = re.sub(rf"\.attn\.{theirs}$", f".att.{official}", name)
    return name


def to_fla_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor of an official parameter in the layout of the fla format."""
    last = name.rsplit(".", 1)[-1]
    if re.fullmatch(r"[wavg][12]", last):
        return tensor.T.contiguous()
    squeezed = last in ("w0", "a0", "v0", "k_k", "k_a") or name.endswith("ffn.x_k")
    return tensor.reshape(-1) if squeezed else tensor


def fla_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official name -> tensor becomes the fla state dict."""
    named = {name: to_fla_name(name) for name in tensors}
    return {theirs: to_fla_tensor(name, tensors[name]) for name, theirs in named.items() if theirs is not None}


def fla_config(config: RWKV7Config, dtype: torch.dtype) -> dict[str, Any]:
    """config.json for an exported model. Token 0 ends a document: bos, eos and pad are 0, or it would
    never stop.
    """
    return {
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        "attn": None,
        "attn_mode": "chunk",
        "hidden_size": config.n_embd,
        "hidden_ratio": config.dim_ffn / config.n_embd,
        "intermediate_size": config.dim_ffn,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "decay_low_rank_dim": config.decay_rank,
        "gate_low_rank_dim": config.gate_rank,
        "a_low_rank_dim": config.iclr_rank,
        "v_low_rank_dim": config.value_rank,
        "value_dim": [config.n_embd] * config.n_layer,
        "hidden_act": "sqrelu",
        "max_position_embeddings": 1048576,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "fuse_norm": False,
        "fuse_cross_entropy": True,
        "use_l2warp": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
