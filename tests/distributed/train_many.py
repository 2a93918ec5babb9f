"""Worker of test_strategies.py and its likes: runs several recipes one after the other inside the same processes.

For each recipe it leaves in the out_dir `engine.json`, learning rate and weight decay as the innermost optimizer holds
them after each update, and of each rank `rows-<rank>.json`, the rows of each update by its step.
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
    seen, rows = [], {}
    original = loop.on_batch_end

    def spy(state, stats, run):
        seen.append([(g["name"], g["lr"], g["weight_decay"]) for g in innermost(run.optimizer).param_groups])
        rows[state.step] = [row for batch in stats.batch_rows for row in batch]
        original(state, stats, run)

    loop.on_batch_end = spy
    try:
        loop.train(config)
    finally:
        loop.on_batch_end = original
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (Path(config.out_dir) / f"rows-{rank}.json").write_text(json.dumps(rows))
    if rank == 0:
        (Path(config.out_dir) / "engine.json").write_text(json.dumps(seen))
    AcceleratorState._reset_state(reset_partial_state=False)
    if PartialState._shared_state["distributed_type"] == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    GradientState._reset_state()


def main(recipes: list[str]) -> bool:
    set_environment_defaults()
    for recipe in recipes:
        run(recipe)
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
    if PartialState._shared_state:
        PartialState().destroy_process_group()
