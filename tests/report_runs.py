"""Run folders for the report's tests, written with the same writers as a real run's."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

import yaml

from rwkv_accel.tracking.loss_json import LossJson
from rwkv_accel.tracking.train_log import TrainLog

TOKENS_PER_STEP = 640


def loss_at(step: int, scale: float = 1.0) -> float:
    return scale * (1.5 + 3 * math.exp(-step / 30) + 0.1 * math.sin(7 * step))


def step_records(num_steps: int, scale: float = 1.0, **changes) -> list[dict]:
    """changes: name=function of the step, or a value."""
    records = []
    for step in range(1, num_steps + 1):
        record = {
            "step": step, "epoch": 0, "loss": loss_at(step, scale), "smoothed_loss": loss_at(step, scale) + 0.01,
            "lr": 1e-3 * scale * (1 - step / (2 * num_steps)), "weight_decay": 0.1, "grad_norm": 2.0 / step,
            "target_tokens": 200, "tokens": TOKENS_PER_STEP, "kt_s": 1.25 * scale, "target_kt_s": 0.4, "it_s": 2.0,
            "wait_share": 0.01, "wall_seconds": 0.5 * step, "memory_bytes": 3 << 30,
        }  # fmt: skip
        record |= {name: change(step) if callable(change) else change for name, change in changes.items()}
        records.append(record)
    return records


def append(folder: Path, name: str, records: list[dict]) -> None:
    """Add records to a file of the run as its writer does; the file of a run that goes on stays readable."""
    log = LossJson(folder / name, 10**12)
    for record in records:
        log.append(record)
    log.close()


def eval_records(steps: list[int], name: str = "validation", scale: float = 1.0) -> list[dict]:
    return [
        {
            "step": step, "epoch": 0, "set": name, "loss": loss_at(step, scale) + 0.25, "perplexity": 3.0,
            "bits_per_byte": 0.5 * scale, "target_tokens": 900,
        }
        for step in steps
    ]  # fmt: skip


def write_run(
    folder: Path,
    *,
    num_steps: int = 100,
    scale: float = 1.0,
    answer: str = "I am fine.",
    resumed_at: int = 60,
    **changes,
) -> Path:
    """A run with records, three validations, samples and a resume."""
    folder.mkdir(parents=True)
    append(folder, "loss_data.json", step_records(num_steps, scale, **changes))
    append(folder, "eval_data.json", eval_records([0, num_steps // 2, num_steps], scale=scale))
    early = [{"prompt": "How are you?", "text": "aaaa", "stopped": False}]
    late = [{"prompt": "How are you?", "text": answer, "stopped": True}]
    samples = [
        {"step": num_steps // 2, "epoch": 0, "stopped_share": 0.0, "samples": early},
        {"step": num_steps, "epoch": 1, "stopped_share": 1.0, "samples": late},
    ]
    append(folder, "samples.json", samples)
    recipe = {
        "out_dir": str(folder),
        "model": {"path": "base.pth"},
        "optim": {"lr_init": 1e-3 * scale, "betas": [0.9, 0.99]},
        "peft": {"method": "lora", "rank": 8},
        "trainer": {"precision": "32-true", "max_epochs": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        "rwkv_accel": "0.1.0",
        "git_commit": "0123456789abcdef",
        "packages": {"torch": "2.13.0"},
        "gpus": [],
        "world_size": 2,
        "model": {"layers": 12, "parameters": 191_084_544},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    log = TrainLog(folder / "train_log.txt", recipe, 0, lambda: datetime(2026, 1, 31, 12, 0, 0))
    log.message(f"stopped by SIGTERM after step {resumed_at}, saved; start the same command again to continue")
    log = TrainLog(folder / "train_log.txt", recipe, resumed_at, lambda: datetime(2026, 1, 31, 13, 0, 0))
    log.message(f"finished after step {num_steps}")
    log.close()
    return folder
