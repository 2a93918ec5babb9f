"""What a resume checkpoint costs: time taken from the training, bytes on disk, and seconds until a run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rwkv_accel.bench.harness import Options, Row, in_fresh_process
from rwkv_accel.bench.start import DEMO, TIMEOUT_SECONDS
from rwkv_accel.bench.train import CTX_LEN, SHAPE

RANK = 32


def measure(options: Options) -> list[Row]:
    if options.device != "cpu":
        return []  # not measured: the step and the copy to the host would need a device of their own
    found = in_fresh_process(__name__, {"threads": options.threads, "repeats": options.repeats})
    what = f"0.1B shape, LoRA r={RANK}"
    rows = [
        Row(
            f"{what}: a checkpoint in the {name} holds the training up",
            1000 * found[name],
            "ms",
            "" if name == "foreground" else "in the foreground",
            None if name == "foreground" else found["foreground"] / found[name],
            note=f"{found[name] / found['step']:.2%} of a step of {CTX_LEN} tokens, {found['step']:.2f} s",
        )
        for name in ("foreground", "background")
    ]
    size = f"{found['mib']:.1f} MiB"
    rows.append(Row(f"{what}: bytes on disk per trained byte (fp32)", found["bytes_ratio"], "x", note=size))
    if Path(DEMO).is_file():
        rounds = [_resume() for _ in range(min(options.repeats, 3))]
        fresh, resumed = (median(seconds) for seconds in zip(*rounds))
        rows.append(
            Row("demo: command to first update after a kill", resumed, "s", "of a fresh start", fresh / resumed)
        )
    return rows


def _run(arguments: dict[str, Any]) -> dict[str, float]:
    import torch

    from rwkv_accel.checkpoint import CheckpointWriter, save_checkpoint
    from rwkv_accel.config.schema import CheckpointConfig, ModelConfig, OptimConfig, PeftConfig, TrainerConfig
    from rwkv_accel.model.config import RWKV7Config
    from rwkv_accel.model.init import generate_init_weight
    from rwkv_accel.model.precision import Precision
    from rwkv_accel.optim import build_optimizer
    from rwkv_accel.peft.apply import load_model_and_apply_peft
    from rwkv_accel.runtime import build_accelerator

    torch.set_num_threads(arguments["threads"])
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.pth"
        generate_init_weight(RWKV7Config.for_new_model(*SHAPE), base, seed=0)
        model = load_model_and_apply_peft(
            ModelConfig(path=str(base)), PeftConfig(rank=RANK), precision=Precision.from_name("32-true")
        )
        accelerator = build_accelerator(TrainerConfig(), 1)
        model, optimizer = accelerator.prepare(model, build_optimizer(model, OptimConfig()))
        ids_BT = torch.randint(1, SHAPE[2], (1, CTX_LEN + 1), generator=torch.Generator().manual_seed(0))

        def step() -> None:
            accelerator.backward(model(ids_BT[:, :-1], ids_BT[:, 1:].contiguous()) / CTX_LEN)
            optimizer.step()
            optimizer.zero_grad()

        writers = {
            name: CheckpointWriter(Path(folder) / name, CheckpointConfig(background=name == "background"))
            for name in ("foreground", "background")
        }

        def save(name: str) -> Path:
            return save_checkpoint(
                accelerator, model, optimizer, {"step": 0},
                writer=writers[name], name="step-00000001", config={}, base_digest="",
            )  # fmt: skip

        seconds: dict[str, list[float]] = {"step": [], **{name: [] for name in writers}}
        for turn in range(arguments["repeats"] + 1):
            timed = {"step": _seconds(step)}
            for name, writer in writers.items():
                timed[name] = _seconds(lambda name=name: save(name))  # type: ignore[misc]
                writer.wait()
            for name, value in timed.items():
                if turn:
                    seconds[name].append(value)
        size = sum(file.stat().st_size for file in save("foreground").iterdir())
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {
        **{name: median(values) for name, values in seconds.items()},
        "bytes_ratio": size / trained,
        "mib": size / 2**20,
    }


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _resume() -> tuple[float, float]:
    """Seconds from the command to the first update of the demo: started afresh, and after a kill."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "rwkv_accel.train", DEMO, f"out_dir={folder}/run", "checkpoint.every_n_steps=1"
        ]  # fmt: skip
        fresh = _until_first_update(command, Path(folder) / "fresh", Path(folder) / "run" / "checkpoints")
        return fresh, _until_first_update(command, Path(folder) / "resumed", None)


def _until_first_update(command: list[str], mark: Path, checkpoints: Path | None) -> float:
    """Start a run, wait for its first update and, if asked for, for a checkpoint; then kill it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        ["env", f"RWKV_ACCEL_STARTED_FILE={mark}", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seconds: float | None = None
    try:
        while time.perf_counter() - start < TIMEOUT_SECONDS:
            if seconds is None and mark.exists():
                seconds = time.perf_counter() - start
            if seconds is not None and (checkpoints is None or any(checkpoints.glob("step-*/manifest.json"))):
                return seconds
            time.sleep(0.01)
        raise RuntimeError(f"the demo made no update within {TIMEOUT_SECONDS:g} s")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(json.loads(sys.argv[1]))) + "\n")
