"""What the checkpoint tests share: a tiny partly frozen model, and folders written without any model."""

import json
from pathlib import Path

import torch
from torch import nn

from rwkv_accel.checkpoint.format import STATE_FILE, TRAINABLE_FILE, write_folder
from rwkv_accel.checkpoint.writer import Snapshot


def simple_snapshot(step: int, value: float = 1.0) -> Snapshot:
    """What a checkpoint with one tensor holds."""
    tensors = {TRAINABLE_FILE: {"w": torch.full((4, 3), value)}}
    return Snapshot(step, tensors, {STATE_FILE: json.dumps({"state": {"step": step}})})


def write_simple(folder: Path, step: int, value: float = 1.0) -> Path:
    """A complete checkpoint folder with one tensor."""
    simple = simple_snapshot(step, value)
    write_folder(folder, step=step, tensors=simple.tensors, documents=simple.documents)
    return folder


class TinyModel(nn.Module):
    def __init__(self, rank: int = 3) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, 6))
        self.lora_B = nn.Parameter(torch.randn(6, rank))
        self.unused = nn.Parameter(torch.randn(5))  # never gets a gradient, like layer 0's v0 in some checkpoints

    def forward(self, x):
        y = self.frozen(x) + x @ self.lora_A.T @ self.lora_B.T
        return nn.functional.dropout(y, 0.3)


def train(model, optimizer, num_steps: int) -> list[float]:
    """Updates on random data with dropout: the result depends on parameters, moments and the generator."""
    losses = []
    for _ in range(num_steps):
        loss = model(torch.randn(4, 6).to(model.lora_A.dtype)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
