"""Show what a run did: python -m rwkv_accel.report OUT [OUT2 ...]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail, run_program, set_environment_defaults

DEFAULT_PORT = 8720


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.report",
        description="One HTML file with the curves, samples and settings of one run, or of several side by side.",
        epilog="Example: python -m rwkv_accel.report out/demo out/demo-lr2 --output compare.html",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="OUT", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: OUT/report.html; several: report.html")
    parser.add_argument(
        "--points", type=int, default=4000, metavar="N", help="most points of a curve (default 4000); extremes are kept"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="score N documents with each run's newest weights and show their tokens by loss; later reports keep it",
    )
    parser.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=DEFAULT_PORT,
        metavar="PORT",
        help=f"follow the runs while they go on, in a browser (default port {DEFAULT_PORT}; 0: a free one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values that make no sense."""
    if args.points < 100:
        raise UserError(f"--points {args.points} is too few for a curve; give 100 or more")
    if args.tokens is not None and args.tokens < 1:
        raise UserError(f"--tokens {args.tokens} shows nothing; give 1 or more documents, or leave it out")
    if args.serve is not None and not 0 <= args.serve < 1 << 16:
        raise UserError(f"--serve {args.serve} is no port; give 0 to 65535")
    if args.serve is not None and args.output:
        raise UserError("--serve writes no file; leave --output out")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    # Intermixed: runs may come after options.
    args = build_parser().parse_intermixed_args(argv)
    set_environment_defaults()
    try:
        check(args)
        if args.tokens is not None:
            from rwkv_accel.report.tokens import write_token_losses

            for run in args.runs:
                write_token_losses(run, args.tokens)
        if args.serve is not None:
            from rwkv_accel.report.serve import serve

            serve(args.runs, host=args.host, port=args.serve, num_points=args.points)
            return 0
        from rwkv_accel.report import write_report
        from rwkv_accel.tracking import REPORT_FILE

        default = args.runs[0] / REPORT_FILE if len(args.runs) == 1 else Path(REPORT_FILE)
        print(f"written to {write_report(args.runs, args.output or default, args.points)}")  # noqa: T201
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    run_program(main)
