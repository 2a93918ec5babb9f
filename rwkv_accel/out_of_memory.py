"""What to do when memory runs out: remedies that fit the recipe and the way it was launched."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv_accel.checkpoint.format import CHECKPOINTS_DIR, list_complete
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.heartbeat import pulse

# How torch's allocators without an exception of their own say it.
PHRASES = ("not enough memory", "can't allocate memory", "out of memory")
# The next way to spread a run, from accelerate_configs/.
NEXT_STRATEGY = {
    "ddp": "zero2",
    "fsdp2": "zero3_offload",
    "zero1": "zero2",
    "zero2": "zero3",
    "zero2_offload": "zero3_offload",
    "zero3": "zero3_offload",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in PHRASES)


def out_of_memory_help(config: RunConfig, error: BaseException, *, rank: int, strategy: str, world_size: int) -> str:
    """One message: where, what may help most, and what is saved."""
    said = str(error).strip().splitlines()
    kept = list_complete(Path(config.out_dir) / CHECKPOINTS_DIR)
    newest = f"the newest checkpoint is {kept[-1][0]}" if kept else "no checkpoint was written yet"
    return (
        f"out of memory on rank {rank} in {pulse.phase}, step {pulse.step} ({said[0] if said else 'no details'}). "
        f"{newest}; start again with less: {'; or '.join(remedies(config, strategy, world_size))}"
    )


def remedies(config: RunConfig, strategy: str, world_size: int) -> list[str]:
    """What needs less memory in this run, the least costly first. A resume accepts those that keep the global batch."""
    trainer, peft = config.trainer, config.peft
    found = []
    if trainer.micro_batch_size > 1:
        smaller = max(n for n in range(1, trainer.micro_batch_size) if trainer.micro_batch_size % n == 0)
        keys = f"trainer.micro_batch_size={smaller}"
        if trainer.global_batch_size is None:
            more = (trainer.accumulate_grad_batches or 1) * trainer.micro_batch_size // smaller
            keys += f" trainer.accumulate_grad_batches={more}"
        found.append(f"{keys} (the same global batch)")
    if trainer.gradient_checkpointing in ("none", "selective"):
        found.append("trainer.gradient_checkpointing=block (the same result, slower)")
    elif trainer.gradient_checkpointing == "block" and torch.cuda.is_available():
        found.append("trainer.gradient_checkpointing=offload (the same result, what is kept waits on the host)")
    on_device = config.optim.optimizer == "adamw" and not config.optim.offload
    if on_device and strategy in ("single", "ddp") and torch.cuda.is_available():
        found.append("optim.offload=true (the same result, AdamW's moments wait on the host)")
    if trainer.precision == "32-true":
        found.append("trainer.precision=bf16-mixed")
    if peft.method != "full" and peft.base_quant == "none":
        found.append("peft.base_quant=nf4")
    if peft.method == "full":
        found.append("peft.method=lora")
    if strategy in NEXT_STRATEGY and world_size > 1:
        found.append(f"--config_file accelerate_configs/{NEXT_STRATEGY[strategy]}.yaml")
    elif strategy == "single":
        found.append("more processes with accelerate_configs/zero2.yaml or zero3.yaml")
    found.append(f"data.ctx_len={max(config.data.ctx_len // 2, 1)}")
    return found
