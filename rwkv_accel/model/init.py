"""Official random initialisation of RWKV-7 (RWKV-LM train_temp/src/model.py), for a model of any size.

Shapes: C channels, L layers, N head size, V vocab, R inner rank.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkv_accel.model.config import RWKV7Config, Shape, parameter_shapes
from rwkv_accel.model.io import save_checkpoint

_ORTHOGONAL_GAIN = {
    "att.receptance.weight": 1.0,
    "att.key.weight": 0.1,
    "att.value.weight": 1.0,
    "ffn.key.weight": 1.0,
}
_ZEROS = ("att.output.weight", "ffn.value.weight", "att.w1", "att.a1", "att.v1", "att.g1")
_LOW_RANK_OUT = ("att.w2", "att.a2", "att.v2", "att.g2")


def generate_init_weight(
    config: RWKV7Config, path: str | os.PathLike[str], *, seed: int, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a freshly initialised checkpoint atomically (.pth or .safetensors by name); returns the path."""
    return save_checkpoint(init_state_dict(config, seed, dtype), path)


def init_state_dict(config: RWKV7Config, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Official name -> initial tensor in `dtype`, on the CPU. The same seed gives the same tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        block, _, layer_name = name.removeprefix("blocks.").partition(".")
        if not block.isdigit():
            value = _outer(name, shape, generator)
        elif "weight" in layer_name or "bias" in layer_name or layer_name in _ZEROS + _LOW_RANK_OUT:
            value = _matrix_or_norm(layer_name, shape, int(block), config, generator)
        else:
            value = _vector(layer_name, int(block), config).view(shape)
        tensors[name] = value.to(dtype)
    return tensors


def _orthogonal(shape: Shape, gain: float, generator: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)


def _outer(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """emb, head and ln_out."""
    if name == "emb.weight":
        return torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
    if name == "head.weight":
        vocab_size, n_embd = shape
        return _orthogonal(shape, 0.5 * max(1.0, (vocab_size / n_embd) ** 0.5), generator)
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)


def _matrix_or_norm(name: str, shape: Shape, layer: int, config: RWKV7Config, generator: torch.Generator) -> Tensor:
    if name in _ZEROS or name.endswith("bias"):
        return torch.zeros(shape)
    if name in _ORTHOGONAL_GAIN:
        return _orthogonal(shape, _ORTHOGONAL_GAIN[name], generator)
    if name in _LOW_RANK_OUT:
        return _orthogonal(shape, 0.1 * max(1.0, (shape[0] / shape[1]) ** 0.5), generator)
    if name == "att.ln_x.weight":
        return torch.full(shape, ((1 + layer) / config.n_layer) ** 0.7)
    assert name in ("ln0.weight", "ln1.weight", "ln2.weight"), name
    return torch.ones(shape)


def _vector(name: str, layer: int, config: RWKV7Config) -> Tensor:
    """Per-channel parameters, in fp64 until the caller casts them."""
    channel = torch.arange(config.n_embd, dtype=torch.float64)
    # The official formula divides by L - 1; a model of one layer takes the first layer's values.
    depth = layer / max(1, config.n_layer - 1)
    height = 1 - layer / config.n_layer
    share = channel / config.n_embd
    linear = channel / (config.n_embd - 1) - 0.5
    middle = (config.head_size - 1) / 2
    zigzag = (channel % config.head_size - middle) / middle
    zigzag = zigzag * zigzag.abs()
    lerp_power = {
        "att.x_r": 0.2 * height,
        "att.x_w": 0.9 * height,
        "att.x_k": 0.7 * height,
        "att.x_v": 0.7 * height,
        "att.x_a": 0.9 * height,
        "att.x_g": 0.2 * height,
        "ffn.x_k": height**4,
    }
    if name in lerp_power:
        return 1 - share ** lerp_power[name]
    formulas = {
        "att.w0": -6 + 6 * (channel / (config.n_embd - 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "att.v0": 0.73 - 0.4 * linear,
        "att.k_k": 0.71 - 0.1 * linear,
        "att.k_a": torch.full_like(channel, 1.02),
        "att.r_k": torch.full_like(channel, -0.04),
    }
    return formulas[name]
