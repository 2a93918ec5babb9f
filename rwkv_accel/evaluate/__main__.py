"""Measure a model: python -m rwkv_accel.evaluate PATH --data FILE --choices FILE --answers FILE"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rwkv_accel.errors import UserError
from rwkv_accel.generation.flags import add_model_flags, check_paths
from rwkv_accel.generation.params import STOP_SETS
from rwkv_accel.runtime import end_on_signals, fail, run_program, set_environment_defaults


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.evaluate",
        description="Loss, perplexity and bits per byte over files of text or chat, accuracy on multiple choice, exact "
        "match of generated answers. Under accelerate launch the work is shared, with the same numbers.",
        epilog="Without a file, a run is measured on what its own recipe validates on. "
        "Example: accelerate launch -m rwkv_accel.evaluate out/demo --data valid.jsonl --choices mmlu.jsonl",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="any key of data, eval and trainer")

    files = parser.add_argument_group("files (each may be repeated)")
    files.add_argument("--data", action="append", default=[], metavar="FILE", help="whatever data.path reads")
    files.add_argument("--choices", action="append", default=[], metavar="FILE", help="prompt, choices, answer")
    files.add_argument("--answers", action="append", default=[], metavar="FILE", help="prompt, answer")
    files.add_argument("--limit", type=int, metavar="N", help="only the first N records of each file")
    files.add_argument("--ctx-len", type=int, metavar="N", help="row length in tokens; longer documents are split")
    files.add_argument(
        "--template", help="rwkv, raw or a .jinja file, as data.template; default: what was trained with, else rwkv"
    )

    answers = parser.add_argument_group("answers")
    answers.add_argument("--regex", metavar="RE", help=r"what of a reply is its answer, e.g. '#### (-?[0-9.,]+)'")
    answers.add_argument(
        "--normalize",
        action="append",
        choices=("case", "punctuation", "articles", "numbers"),
        help="what does not count; may be repeated",
    )
    answers.add_argument("--max-new-tokens", type=int, metavar="N")
    answers.add_argument("--stop", action="append", choices=STOP_SETS, metavar="NAME", help=", ".join(STOP_SETS))
    answers.add_argument("--stop-text", action="append", default=[], metavar="TEXT", help="may be repeated")

    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    out.add_argument("--details", metavar="FILE", help="write every question with its scores or reply, as JSONL")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    # Intermixed: overrides may come after options.
    args = build_parser().parse_intermixed_args(argv)
    try:
        check_paths(args.path, args.base, args.adapter)
        set_environment_defaults()
        from rwkv_accel.evaluate.run import run

        run(args)
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    end_on_signals()
    run_program(main)
