"""Random models that exercise every parameter: no zero matrix, no neutral vector, as the official init has them."""

import math

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.rwkv7 import RWKV7

TINY = RWKV7Config(
    vocab_size=37,
    n_embd=64,
    n_layer=3,
    head_size=32,
    dim_ffn=256,
    decay_rank=8,
    iclr_rank=6,
    value_rank=4,
    gate_rank=10,
)


def make_tensors(config, seed=0, dtype=torch.float64):
    """Official name -> random tensor of the magnitudes of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        last = name.rpartition(".")[2]
        if last == "bias":
            value = 0.1 * noise
        elif last == "weight" and ".ln" in f".{name}":
            value = 1 + 0.2 * noise
        elif last.startswith("x_"):
            value = torch.sigmoid(noise)
        elif last == "w0":
            value = -1 + 2 * noise
        elif last in ("k_k", "k_a"):
            value = 0.8 + 0.2 * noise
        elif last in ("a0", "v0", "r_k"):
            value = 0.3 * noise
        elif name == "emb.weight":
            value = noise
        else:
            # Linear weights are [out, in], low-rank matrices [in, out].
            value = noise / math.sqrt(shape[1] if last == "weight" else shape[0])
        tensors[name] = value.to(dtype)
    return tensors


def make_model(config=TINY, seed=0, dtype=torch.float64, backend="reference"):
    """Model of `make_tensors` whose arithmetic and weights are `dtype`."""
    model = RWKV7(config, compute_dtype=dtype, wkv_backend=backend).to(dtype)
    model.load_state_dict(make_tensors(config, seed, dtype), strict=True)
    return model


@pytest.fixture(scope="session")
def tiny_config():
    return TINY


@pytest.fixture(scope="session")
def tensors_of():
    return make_tensors


@pytest.fixture(scope="session")
def model_of():
    return make_model
