"""Small data sets on disk, and loaders over them."""

import json
from pathlib import Path

import pytest
import torch

from rwkv_accel.config.schema import DataConfig, TrainerConfig
from rwkv_accel.data.loader import TrainLoader, build_train_loader


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records as a .jsonl file; returns its path as a string."""

    def write(records, name="data.jsonl") -> str:
        path = Path(tmp_path) / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return str(path)

    return write


def make_loader(
    path, *, rank=0, world_size=1, vocab_size=257, trainer=None, device="cpu", run_first=None, **data
) -> TrainLoader:
    """A loader with the byte tokenizer unless told otherwise."""
    config = DataConfig(path=path, **{"tokenizer": "byte", "ctx_len": 32, **data})
    return build_train_loader(
        config,
        TrainerConfig(**(trainer or {})),
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        vocab_size=vocab_size,
        run_first=run_first,
    )
