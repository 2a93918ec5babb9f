"""How fast text becomes batches, next to what the demo's model consumes, and what opening a huge data set costs."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from rwkv_accel.bench.harness import Options, Row, in_fresh_process, peak_memory_mib

NUM_CHATS = 10_000
NUM_INDEXED = 10_000_000
INDEXED_LENGTHS = (32, 330)
NUM_STEPS = 40
CTX_LEN = 1024
WORDS = (
    "the a model state token row learns reads of and to with from every never more less time data, answer. 7 42".split()
)


def measure(options: Options) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(folder) / "chats.jsonl")
        rows = [*_throughput(Path(folder), options), *_waiting(Path(folder))]
        write_index(Path(folder) / "big")
        for packing in ("pack", "pad"):
            arguments = {"path": f"{folder}/big.bin", "cache_dir": f"{folder}/cache", "packing": packing}
            first, again = (in_fresh_process("rwkv_accel.bench.data", arguments) for _ in range(2))
            what = f"start-up on {NUM_INDEXED // 1_000_000} million documents, {packing}"
            rows += [
                Row(what, again["seconds"], "s", note=f"the first time, with planning: {first['seconds']:.1f} s"),
                Row(f"{what}, memory", again["mib"], "MiB", note="beyond the imports, with the first update's rows"),
            ]
    return rows


def _throughput(folder: Path, options: Options) -> list[Row]:
    import torch

    from rwkv_accel.config.schema import DataConfig, TrainerConfig
    from rwkv_accel.data.loader import build_train_loader

    data = DataConfig(path=str(folder / "chats.jsonl"), ctx_len=CTX_LEN, cache_dir=None)
    build = collate = float("inf")
    tokens = 0
    for _ in range(options.repeats):
        start = time.perf_counter()
        loader = build_train_loader(
            data, TrainerConfig(), rank=0, world_size=1, device=torch.device("cpu"), vocab_size=65536
        )
        middle = time.perf_counter()
        tokens = sum(batch.num_tokens for window in loader.windows(0, 0) for batch in window.batches)
        build, collate = min(build, middle - start), min(collate, time.perf_counter() - middle)
    demo = _demo_tokens_per_second(options)
    baseline = "tokens/s that the demo's model trains on"
    return [
        Row("read, encode, pack", tokens / build, "tokens/s", baseline, tokens / build / demo),
        Row("collate", tokens / collate, "tokens/s", baseline, tokens / collate / demo),
        Row("all three", tokens / (build + collate), "tokens/s", baseline, tokens / (build + collate) / demo),
    ]


def _waiting(folder: Path) -> list[Row]:
    """Share of the time that a training loop on the demo's model stands still because the next rows are not there."""
    import torch

    from rwkv_accel.config.schema import DataConfig, TrainerConfig
    from rwkv_accel.data.loader import build_train_loader

    rows = []
    for kind, streaming in (("rows planned before", False), ("a stream", True)):
        data = DataConfig(
            path=str(folder / "chats.jsonl"), tokenizer="byte", ctx_len=256, cache_dir=None, streaming=streaming
        )
        loader = build_train_loader(
            data, TrainerConfig(micro_batch_size=4), rank=0, world_size=1, device=torch.device("cpu"), vocab_size=257
        )
        model, windows = _demo_model(), loader.windows(0, 0)
        next(windows)
        waited, start = 0.0, time.perf_counter()
        for _ in range(NUM_STEPS):
            before = time.perf_counter()
            (batch,) = next(windows).batches
            waited += time.perf_counter() - before
            model(batch.ids_BT, batch.labels_BT, cu_seqlens=batch.cu_seqlens).backward()
        share = waited / (time.perf_counter() - start)
        windows.close()
        rows.append(Row(f"share of the time that training waits for data, {kind}", 100 * share, "%"))
    return rows


def _demo_model() -> Any:
    """The model of launch/recipes/demo.yaml."""
    from rwkv_accel.model.config import RWKV7Config
    from rwkv_accel.model.init import init_state_dict
    from rwkv_accel.model.rwkv7 import RWKV7

    config = RWKV7Config.for_new_model(4, 128, 257, 32)
    model = RWKV7(config)
    model.load_state_dict(init_state_dict(config, 0))
    return model


def _demo_tokens_per_second(options: Options) -> float:
    """Forward and backward of the demo's model on one packed batch."""
    import torch

    model = _demo_model()
    ids_BT = torch.randint(1, 257, (4, 256))
    best = float("inf")
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        model(ids_BT, ids_BT).backward()
        best = min(best, time.perf_counter() - start)
    return ids_BT.numel() / best


def write_chats(path: Path) -> None:
    """Questions and answers of random words, with the spread of lengths that chats have."""
    words = random.Random(0)

    def text() -> str:
        return " ".join(words.choices(WORDS, k=max(1, min(600, int(words.lognormvariate(4, 0.8))))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(NUM_CHATS):
            turns = [{"role": role, "content": text()} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_index(stem: Path) -> None:
    """A binidx of NUM_INDEXED documents; the tokens are a hole in the file, which takes no space."""
    import numpy as np

    from rwkv_accel.data.binidx import index_bytes

    lengths = np.random.default_rng(0).integers(*INDEXED_LENGTHS, NUM_INDEXED)
    stem.with_suffix(".idx").write_bytes(index_bytes(lengths, np.dtype(np.uint16)))
    with stem.with_suffix(".bin").open("wb") as file:
        file.truncate(int(lengths.sum()) * 2)


def open_index(path: str, cache_dir: str, packing: Literal["pack", "pad"]) -> dict[str, float]:
    """Seconds and added peak memory up to the first window, deep in an epoch."""
    import torch

    from rwkv_accel.config.schema import DataConfig, TrainerConfig
    from rwkv_accel.data.loader import build_train_loader

    data = DataConfig(path=path, cache_dir=cache_dir, ctx_len=CTX_LEN, packing=packing)
    before, start = peak_memory_mib(), time.perf_counter()
    loader = build_train_loader(
        data, TrainerConfig(), rank=0, world_size=1, device=torch.device("cpu"), vocab_size=65536
    )
    next(loader.windows(3, loader.rows_per_epoch // 2))
    return {"seconds": time.perf_counter() - start, "mib": peak_memory_mib() - before}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(open_index(**json.loads(sys.argv[1]))) + "\n")
