"""Tiny checkpoints, tiny data and launches of real processes, for the integration and distributed tests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rwkv_accel.runtime import cpp_compiler

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")
WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "old",
    "mills",
    "and",
    "quiet",
    "farms",
    "where",
    "nobody",
    "counts",
    "the",
    "hours",
]


def tiny_checkpoint(path: Path, *, n_layer=2, n_embd=64, head_size=32, vocab_size=257, seed=0) -> Path:
    """An official-init checkpoint with noise on top, so that no gradient is zero."""
    from rwkv_accel.model.config import RWKV7Config
    from rwkv_accel.model.init import init_state_dict
    from rwkv_accel.model.io import save_checkpoint

    config = RWKV7Config.for_new_model(n_layer, n_embd, vocab_size, head_size)
    weights = init_state_dict(config, seed=seed, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed + 1)
    weights = {n: w + 0.05 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_checkpoint(weights, path)
    return path


def ragged_jsonl(path: Path, num_documents=48, seed=0) -> Path:
    """Prompt/response pairs of very different lengths."""
    rng = random.Random(seed)
    with path.open("w") as out:
        for _ in range(num_documents):
            q, a = (" ".join(rng.choices(WORDS, k=rng.randint(1, n))) for n in (3, 5))
            out.write(json.dumps({"q": q, "a": a}) + "\n")
    return path


def write_recipe(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(**extra: str) -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), **extra}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


def launch(config: str, processes: int, *args: str, timeout=240, check=True, **env: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with a file of accelerate_configs/ and whatever follows (`-m module ...` or a script)."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"),
        "--num_processes", str(processes), "--main_process_port", "0", *map(str, args),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return done


def train_cli(*args: object, timeout=240, **env: str) -> subprocess.CompletedProcess:
    """`python -m rwkv_accel.train` in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "rwkv_accel.train", *map(str, args)],
        cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
