"""Memory of a LoRA step above the frozen weights, in the released shapes: by count, for which no GPU is needed.

`rwkv_accel.plan` counts, with the settings of launch/recipes/lora_2b9_small.yaml; `bench train --device cuda` measures
the same. Not in the count: the workspace of the library of matrix products (32 MiB on Hopper) and the driver's context.
"""

from __future__ import annotations

from collections.abc import Iterator

from rwkv_accel.bench.harness import Options, Row
from rwkv_accel.config.schema import OptimConfig, PeftConfig, TrainerConfig
from rwkv_accel.model.config import RWKV7Config
from rwkv_accel.model.precision import Precision
from rwkv_accel.plan.memory import Job, estimate
from rwkv_accel.plan.trace import Work, activations_of, weights_of

SHAPES = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560)}
"""Layers and channels of the released models."""
VOCAB, HEAD_SIZE, RANK, CTX = 65536, 64, 64, 1024
BASES = ("none", "nf4")
SMALL = TrainerConfig(precision="bf16-true", gradient_checkpointing="block", loss_chunk_rows=128)
SMALL_OPTIM = OptimConfig(offload=True)
USUAL = TrainerConfig(precision="bf16-mixed", gradient_checkpointing="block")
GIGABYTE = 1e9


def measure(options: Options) -> Iterator[Row]:
    del options  # nothing is run
    for shape in SHAPES:
        for quant in BASES:
            small, note = counted(shape, quant, SMALL, SMALL_OPTIM)
            usual, _ = counted(shape, quant, USUAL, OptimConfig())
            yield Row(
                f"{label(shape, quant)}, by count", small, "GB", "bf16-mixed, all on the GPU", usual / small, note
            )


def label(shape: str, quant: str) -> str:
    base = "bf16" if quant == "none" else quant
    return f"{shape}, LoRA r={RANK}, ctx {CTX}, base {base}: peak above the base's weights"


def counted(shape: str, quant: str, trainer: TrainerConfig, optim: OptimConfig) -> tuple[float, str]:
    """(GB above the frozen weights on a GPU, what they are) of one row of CTX tokens per update."""
    config = RWKV7Config.for_new_model(*SHAPES[shape], VOCAB, HEAD_SIZE)
    peft = PeftConfig.model_validate({"rank": RANK, "base_quant": quant})
    precision = Precision.from_name(trainer.precision)
    mode = trainer.gradient_checkpointing
    work = Work(1, CTX, packed=False, checkpointing=mode, loss_chunk_rows=trainer.loss_chunk_rows)
    weights = weights_of(config, peft, precision)
    found = estimate(
        "single",
        weights,
        activations_of(config, peft, precision, work),
        Job(1, optim.optimizer, 1, host_moments=optim.offload),
        micro_batch_size=1,
        tokens=CTX,
        checkpointing=mode,
    )
    above = found.peak - weights.frozen - weights.quantised
    parts = {"adapters": weights.trained, "gradients": found.gradients, "moments": found.moments}
    parts["activations"] = above - sum(parts.values())
    note = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items())
    return above / GIGABYTE, note
