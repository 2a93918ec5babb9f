"""Say what a file or folder is: python -m rwkv_accel.inspect PATH"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rwkv_accel.errors import UserError
from rwkv_accel.generation.flags import check_paths
from rwkv_accel.runtime import fail, run_program, set_environment_defaults


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.inspect",
        description="Say what a checkpoint, adapter, state file, resume checkpoint or run folder is.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="+", metavar="path", help="file or folder")
    parser.add_argument(
        "--digest", action="store_true", help="also compute the digest that adapters name their base by"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per path")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    set_environment_defaults()
    for index, path in enumerate(args.paths):
        try:
            check_paths(path)
            from rwkv_accel.inspect.facts import facts_about

            facts = facts_about(path, digest=args.digest)
        except UserError as error:
            return fail(error)
        if args.json:
            print(json.dumps({"path": path} | facts, ensure_ascii=False))  # noqa: T201
            continue
        lines = [path if index == 0 else f"\n{path}"]
        lines += [f"  {key}: {value}" for key, value in facts.items()]
        print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    run_program(main)
