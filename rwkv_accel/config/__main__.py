"""Print the reference of all keys: python -m rwkv_accel.config"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rwkv_accel.config.reference import reference


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m rwkv_accel.config",
        description="Print every key of a recipe with type, bounds, default and meaning, as docs/config.md holds them.",
        allow_abbrev=False,
    ).parse_args(argv)
    sys.stdout.write(reference())
    return 0


if __name__ == "__main__":
    sys.exit(main())
