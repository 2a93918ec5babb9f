"""Worker of test_strategies.py: runs several recipes one after the other inside the same launched processes.

For each recipe it leaves `engine.json` in the out_dir: learning rate and weight decay as the innermost optimizer
holds them after each update.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from rwkv_accel import loop
from rwkv_accel.config.load import load_config
from rwkv_accel.runtime import set_environment_defaults


def innermost(optimizer):
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def run(recipe: str) -> None:
    config = load_config(recipe)
    seen = []
    original = loop.on_batch_end

    def spy(state, stats, run):
        seen.append([(g["name"], g["lr"], g["weight_decay"]) for g in innermost(run.optimizer).param_groups])
        original(state, stats, run)

    loop.on_batch_end = spy
    try:
        loop.train(config)
    finally:
        loop.on_batch_end = original
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (Path(config.out_dir) / "engine.json").write_text(json.dumps(seen))
    AcceleratorState._reset_state(reset_partial_state=False)
    if PartialState._shared_state["distributed_type"] == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    GradientState._reset_state()


if __name__ == "__main__":
    set_environment_defaults()
    for recipe in sys.argv[1:]:
        run(recipe)
    if PartialState._shared_state:
        PartialState().destroy_process_group()
