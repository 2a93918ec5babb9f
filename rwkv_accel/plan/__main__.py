"""Plan a run before it costs anything: python -m rwkv_accel.plan recipe.yaml --gpus 8 --gpu-mem 80"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rwkv_accel.config.load import load_config
from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail, run_program, set_environment_defaults

if TYPE_CHECKING:
    from rwkv_accel.config.schema import TrainerConfig
    from rwkv_accel.plan.memory import Estimate
    from rwkv_accel.plan.run_plan import RunPlan


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.plan",
        description="Memory per GPU, host and disk, traffic and time of a recipe under every strategy, and one "
        "recommendation. Reads no weights.",
        epilog="Example: python -m rwkv_accel.plan launch/recipes/lora_7b.yaml peft.rank=64 --gpus 8 --gpu-mem 80",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="YAML file with the sections of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the recipe's")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in all (default: %(default)s)")
    parser.add_argument("--gpu-mem", type=float, default=80.0, help="GiB of one GPU (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--micro", help="micro-batch sizes to try, 1,2,4 for example (default: powers of two to 32)")
    parser.add_argument("--model", help="size in place of the recipe's file: 0.1b .. 13.3b, or BLOCKSxCHANNELS")
    parser.add_argument("--throughput", type=float, help="tokens per second of all GPUs together, if measured")
    parser.add_argument("--run", help="folder of a run whose speed is taken instead")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = load_config(args.recipe, args.overrides)
        set_environment_defaults()
        from rwkv_accel.plan.run_plan import MICRO_BATCHES, Question, make_run_plan

        if args.gpus < 1 or args.gpu_mem <= 0 or args.gpus_per_node < 1:
            raise UserError("--gpus, --gpus-per-node and --gpu-mem must be above 0")
        question = Question(
            gpus=args.gpus,
            gpu_bytes=args.gpu_mem * 2**30,
            gpus_per_node=args.gpus_per_node,
            micro_batches=_sizes(args.micro) if args.micro else MICRO_BATCHES,
            throughput=args.throughput,
            run_dir=args.run,
            size=args.model,
        )
        plan = make_run_plan(config, question)
    except UserError as error:
        return fail(error)
    if args.json:
        sys.stdout.write(json.dumps(plan.as_dict(), indent=1) + "\n")
    else:
        mode = config.trainer.gradient_checkpointing
        shown = [*lines(plan, question.gpu_bytes, plan.best.checkpointing if plan.best else mode)]
        if plan.best is not None and (note := batch_note(config.trainer, plan.best.micro_batch_size, args.gpus)):
            shown.append(note)
        sys.stdout.write("\n".join(shown) + "\n")
    return 0


def batch_note(trainer: TrainerConfig, micro_batch_size: int, gpus: int) -> str | None:
    """What another micro-batch does to a recipe that does not set the rows per update."""
    if trainer.global_batch_size is not None or micro_batch_size == trainer.micro_batch_size:
        return None
    rest = gpus * (trainer.accumulate_grad_batches or 1)
    return (
        f"note: the recipe has no trainer.global_batch_size, so that micro-batch makes {rest * micro_batch_size:,} "
        f"rows per update of its {rest * trainer.micro_batch_size:,}, with which the run is counted; "
        f"trainer.global_batch_size={rest * trainer.micro_batch_size} would keep them"
    )


def lines(plan: RunPlan, gpu_bytes: float, mode: str) -> Iterator[str]:
    """The plan for people: a table of one checkpointing mode, the parts of the recommendation, the run, the sources."""
    from rwkv_accel.plan.memory import USABLE
    from rwkv_accel.plan.run_plan import gib

    shown = [e for e in plan.estimates if e.checkpointing == mode]
    micros = sorted({e.micro_batch_size for e in shown})
    yield plan.model
    yield f"GiB per GPU at the peak, gradient_checkpointing {mode}; ! does not fit into {gib(gpu_bytes)}"
    yield f"{'micro-batch':>14} " + "".join(f"{micro:>9}" for micro in micros)
    for strategy in dict.fromkeys(e.strategy for e in shown):
        row = {e.micro_batch_size: e.peak for e in shown if e.strategy == strategy}
        cells = (f"{row[m] / 2**30:>8.1f}{' ' if row[m] <= USABLE * gpu_bytes else '!'}" for m in micros)
        yield f"{strategy:>14} " + "".join(cells)
    kept = ", ".join(f"{name} {gib(a.kept)}" for name, a in plan.activations.items())
    yield f"activations kept with the recipe's micro-batch, by gradient_checkpointing: {kept}"
    yield f"disk: {gib(plan.checkpoint_bytes)} per resume checkpoint"
    if plan.best is None:
        yield f"recommended: none; {plan.reason}"
    else:
        yield from _recommended(plan.best, plan.reason)
    if plan.steps is not None:
        yield f"run: {plan.steps:,} updates, {plan.tokens:,} tokens"
    if plan.seconds is not None:
        yield f"time: {plan.seconds / 3600:.1f} hours"
    yield from (f"from {source}" for source in plan.sources)


def _recommended(best: Estimate, reason: str) -> Iterator[str]:
    from rwkv_accel.plan.run_plan import gib

    config = "single_gpu" if best.strategy == "single" else best.strategy
    yield (
        f"recommended: --config_file accelerate_configs/{config}.yaml trainer.micro_batch_size={best.micro_batch_size} "
        f"trainer.gradient_checkpointing={best.checkpointing}"
    )
    yield f"  because: {reason}"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in best.parts().items() if size)
    yield f"  per GPU: {parts}; {gib(best.peak)} at the peak"
    yield f"  per process: {gib(best.host)} of host memory beside the loading, {best.sent / 1e9:.2f} GB sent per update"


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--micro {text}: write sizes like 1,2,4")
    return tuple(map(int, parts))


if __name__ == "__main__":
    run_program(main)
