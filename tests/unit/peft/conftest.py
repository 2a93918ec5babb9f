"""A tiny random base model on disk, with every matrix alive (the official init has zero matrices)."""

from pathlib import Path

import pytest
import torch

from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import init_state_dict
from rwkv_accel.model.io import checkpoint_digest, save_checkpoint

TINY = RWKV7Config.for_new_model(2, 64, 97, 32)


def write_base(path: Path, config: RWKV7Config = TINY, *, seed: int = 0, dtype=torch.float32) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = init_state_dict(config, seed)
    for tensor in tensors.values():
        scale = 0.5 * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 0.05
        tensor += scale * torch.randn(tensor.shape, generator=generator)
    return save_checkpoint({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="session")
def make_base():
    """Function (path, config, seed, dtype) -> path of another random base."""
    return write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.pth")


@pytest.fixture(scope="session")
def base_digest(base) -> str:
    return checkpoint_digest(base)


@pytest.fixture(scope="session")
def ids_BT() -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
