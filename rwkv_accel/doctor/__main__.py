"""Look at the machine, or at all nodes of a launch, and say what is wrong with which.

    python -m rwkv_accel.doctor [recipe.yaml key.sub=value ...]                     this machine alone
    accelerate launch --config_file F ... -m rwkv_accel.doctor [recipe.yaml ...]    every process of a launch

With `python -m rwkv_accel.launch` in place of `accelerate launch`, nodes that do not even start are named, too.
Ends within a minute; exit code 0 when nothing is wrong, 1 when something is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rwkv_accel.cluster.facts import read_recipe
from rwkv_accel.doctor.report import print_checks
from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail, set_environment_defaults, world_size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.doctor",
        description="Check this machine, or under a launcher every node: versions, devices, network, files.",
        epilog="Example: accelerate launch --config_file accelerate_configs/ddp.yaml -m rwkv_accel.doctor a.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="*", help="recipe and overrides of the run that is planned")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    set_environment_defaults()
    try:
        config = read_recipe(args.recipe)
    except UserError as error:
        return fail(error)
    if world_size() == 1:
        from rwkv_accel.doctor.machine import examine_machine

        return print_checks(examine_machine(config))
    from rwkv_accel.doctor.group import examine_group

    return examine_group(config)


if __name__ == "__main__":
    sys.exit(main())
