"""Train a model: accelerate launch -m rwkv_accel.train recipe.yaml key.sub=value ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rwkv_accel.config.load import dump_config, load_config
from rwkv_accel.errors import UserError
from rwkv_accel.runtime import (
    end_on_signals,
    end_with_launcher,
    fail,
    is_main_process,
    launched_strategy,
    process_rank,
    run_program,
    set_environment_defaults,
    world_size,
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.train",
        description="Fine-tune or train an RWKV-7 model as one recipe says. Start the same command again to continue.",
        epilog="Example: accelerate launch -m rwkv_accel.train launch/recipes/demo.yaml optim.lr_init=1e-3",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="YAML file with the sections of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the recipe's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, data, checkpoint and targets, print the plan, and stop",
    )
    return parser.parse_intermixed_args(argv)  # overrides may follow the options


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    end_with_launcher()
    try:
        config = load_config(args.recipe, args.overrides)
        if args.print_config:
            if is_main_process():
                sys.stdout.write(dump_config(config))
            return 0
        set_environment_defaults()
        if args.dry_run:
            from rwkv_accel.dry_run import dry_run

            dry_run(config)
            return 0
        if config.trainer.fast_dev_run:
            from rwkv_accel.rehearsal import rehearse

            rehearse(config)
            return 0
        from rwkv_accel.loop import train

        train(config)
    except UserError as error:
        return fail(error)
    except (RuntimeError, MemoryError) as error:
        from rwkv_accel.out_of_memory import is_out_of_memory, out_of_memory_help

        if not is_out_of_memory(error):
            raise
        text = out_of_memory_help(
            config, error, rank=process_rank(), strategy=launched_strategy(), world_size=world_size()
        )
        return fail(UserError(text), on_any_rank=True)
    return 0


if __name__ == "__main__":
    end_on_signals()
    run_program(main)
