"""A LoRA training step (forward, backward, AdamW) of a model with the shape of the released 0.1B one."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rwkv_accel.bench.harness import Options, Row, in_fresh_process, peak_memory_mib
from rwkv_accel.config.schema import ModelConfig, OptimConfig, PeftConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.init import generate_init_weight
from rwkv_accel.model.precision import Precision
from rwkv_accel.ops.wkv7 import select_backend
from rwkv_accel.optim import build_optimizer
from rwkv_accel.peft.apply import load_model_and_apply_peft

SHAPE = (12, 768, 65536, 64)
CTX_LEN = 512


def measure(options: Options) -> Iterable[Row]:
    if options.device != "cpu":
        from rwkv_accel.bench import train_gpu

        return train_gpu.measure(options)
    backends = ("reference", select_backend("auto", options.device, SHAPE[3])[0])
    found = {
        name: in_fresh_process(
            __name__,
            {"backend": name, "threads": options.threads, "repeats": options.repeats},
        )
        for name in backends
    }
    rows = []
    for name, numbers in found.items():
        against = "" if name == backends[0] else f"op {backends[0]}"
        first = found[backends[0]]
        faster = numbers["tokens_per_second"] / first["tokens_per_second"] if against else None
        smaller = first["peak_mib"] / numbers["peak_mib"] if against else None
        label = f"0.1B shape, LoRA r=32, ctx {CTX_LEN}, op {name}"
        rows.append(Row(label, numbers["tokens_per_second"], "tokens/s", against, faster))
        rows.append(Row(f"{label}: peak memory", numbers["peak_mib"], "MiB", against, smaller))
    return rows


def _run(arguments: dict[str, Any]) -> dict[str, float]:
    torch.set_num_threads(arguments["threads"])
    precision = Precision.from_name("32-true")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        generate_init_weight(RWKV7Config.for_new_model(*SHAPE), base, seed=0)
        config = ModelConfig(path=str(base), wkv_backend=arguments["backend"])
        model = load_model_and_apply_peft(config, PeftConfig(rank=32), precision=precision)
        optimizer = build_optimizer(model, OptimConfig())
        ids_BT = torch.randint(1, SHAPE[2], (1, CTX_LEN + 1), generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(arguments["repeats"] + 1):
            start = time.perf_counter()
            loss = model(ids_BT[:, :-1], ids_BT[:, 1:].contiguous()) / CTX_LEN
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": CTX_LEN / median(seconds[1:]), "peak_mib": peak_memory_mib()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(json.loads(sys.argv[1]))) + "\n")
