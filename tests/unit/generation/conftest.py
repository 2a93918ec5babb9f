"""Tiny models with lively random weights (official initialisation gives nearly uniform logits)."""

import pytest
import torch

from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.rwkv7 import RWKV7


def random_tensors(config: RWKV7Config, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Weights of a size that lets every part of the model matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if last == "bias":
            value = 0.1 * noise
        elif ".ln" in name or name.startswith("ln_out"):
            value = 1 + 0.1 * noise
        elif last.startswith("x_"):
            value = torch.rand(shape, generator=generator, dtype=torch.float64)
        elif last in ("k_k", "k_a"):
            value = 0.8 + 0.2 * noise
        elif last == "w0":
            value = noise - 2
        elif last in ("a0", "v0"):
            value = 0.5 * noise
        elif last == "r_k":
            value = 0.1 * noise
        elif name in ("emb.weight", "head.weight"):
            value = noise * (1.0 if name == "emb.weight" else 3 * shape[-1] ** -0.5)
        else:
            value = noise * (shape[-1] if last == "weight" else shape[0]) ** -0.5
        tensors[name] = value.to(dtype)
    return tensors


def build_model(vocab_size: int, *, n_layer=2, n_embd=32, head_size=16, seed=0, dtype=torch.float64) -> RWKV7:
    config = RWKV7Config(
        vocab_size=vocab_size,
        n_embd=n_embd,
        n_layer=n_layer,
        head_size=head_size,
        dim_ffn=4 * n_embd,
        decay_rank=8,
        iclr_rank=8,
        value_rank=8,
        gate_rank=8,
    )
    model = RWKV7(config, compute_dtype=dtype).to(dtype)
    model.load_state_dict(random_tensors(config, seed, dtype))
    return model


@pytest.fixture(scope="session")
def make_model():
    return build_model


@pytest.fixture(scope="session")
def byte_model() -> RWKV7:
    """fp64, so that batches differ from singles by 1e-15 and no draw can flip."""
    return build_model(257)


@pytest.fixture(scope="session")
def byte_tokenizer():
    return build_tokenizer("byte")


@pytest.fixture
def generator(byte_model, byte_tokenizer) -> TextGenerator:
    return TextGenerator(byte_model, byte_tokenizer)
