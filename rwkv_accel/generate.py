"""Generate text: python -m rwkv_accel.generate PATH "prompt" [options]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rwkv_accel.errors import UserError
from rwkv_accel.generation.flags import add_model_flags, check_paths
from rwkv_accel.generation.params import SamplingParams, stop_texts
from rwkv_accel.runtime import fail, reader_left, run_program, set_environment_defaults


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    default = SamplingParams()
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.generate",
        description="Generate text with a trained run, an adapter or any RWKV-7 checkpoint.",
        epilog='Example: python -m rwkv_accel.generate out/demo "How do magnets work?" --greedy',
        allow_abbrev=False,
    )
    model = add_model_flags(parser)
    parser.add_argument("prompts", nargs="*", metavar="prompt", help="question, put into the template")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without template")
    model.add_argument("--template", help="rwkv, raw or a .jinja file; default: what the run used, else rwkv")

    modes = parser.add_argument_group("instead of prompts")
    modes.add_argument("--chat", action="store_true", help="talk in the terminal; /exit leaves")
    modes.add_argument("--input", metavar="JSONL", help='batch job: a {"prompt": ...} per line, settings by key')
    modes.add_argument("--output", metavar="JSONL", help="results of --input")

    model.add_argument("--device", help="default: cuda if there is one, else cpu")
    model.add_argument("--batch-size", type=int, default=64, metavar="N", help="most replies written at once")
    model.add_argument("--memory", metavar="FILE", help="continue a conversation that --save-memory kept")
    model.add_argument("--save-memory", metavar="FILE", help="keep the conversation after the reply")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N")
    sampling.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="T",
        help="above 0: below 1 sharpens, above 1 flattens",
    )
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token, in place of sampling")
    sampling.add_argument("--top-p", type=float, default=default.top_p, metavar="P", help="nucleus, in (0, 1]")
    sampling.add_argument("--top-k", type=int, default=default.top_k, metavar="K", help="0 keeps all")
    sampling.add_argument("--min-p", type=float, default=default.min_p, metavar="P")
    sampling.add_argument("--presence-penalty", type=float, default=default.presence_penalty, metavar="X")
    sampling.add_argument("--frequency-penalty", type=float, default=default.frequency_penalty, metavar="X")
    sampling.add_argument("--penalty-decay", type=float, default=default.penalty_decay, metavar="D")
    sampling.add_argument("--order", choices=("rwkv", "hf"), default=default.order, help="temperature last or first")
    sampling.add_argument("--seed", type=int, default=default.seed, help="prompt i gets seed + i")
    sampling.add_argument(
        "--stop",
        action="append",
        metavar="NAME",
        help="chat (default with the template), paragraph, line, none",
    )
    sampling.add_argument("--stop-text", action="append", default=[], metavar="TEXT", help="may be repeated")
    sampling.add_argument("--ban-id", action="append", type=int, default=[], metavar="ID", help="may be repeated")

    beams = parser.add_argument_group("beam search (in place of sampling)")
    beams.add_argument("--num-beams", type=int, default=0, metavar="K", help="0 (default) samples")
    beams.add_argument("--num-best", type=int, default=1, metavar="N", help="replies printed, with their scores")
    beams.add_argument("--length-penalty", type=float, default=1.0, metavar="A", help="score = log p / length^A")
    beams.add_argument("--no-early-stop", action="store_true", help="search until no better reply can come")
    return parser


def params_from(args: argparse.Namespace) -> SamplingParams:
    """Checked settings. Raises UserError."""
    names = tuple(args.stop or (["none"] if args.raw else ["chat"]))
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=None if args.greedy else args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        penalty_decay=args.penalty_decay,
        order=args.order,
        stop=stop_texts(names) + tuple(args.stop_text),
        ban_ids=tuple(args.ban_id),
        seed=args.seed,
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other or lack their partner."""
    modes = [bool(args.prompts), args.chat, args.input is not None]
    if sum(modes) != 1:
        raise UserError("give one of: prompts, --chat, or --input with --output")
    if not all(prompt.strip() for prompt in args.prompts):
        raise UserError("the prompt is empty; give some text to start from")
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together: a job reads one file and writes another")
    if args.memory and args.time_state:
        raise UserError("--memory already has a state; leave --time-state out")
    if args.num_beams < 0:
        raise UserError(f"num_beams {args.num_beams} is out of range; it must be 0 (sample) or above")
    if (args.memory or args.save_memory) and (args.input or args.num_beams):
        raise UserError("--memory and --save-memory go with prompts or --chat, without --num-beams")
    if args.save_memory and len(args.prompts) != 1:
        raise UserError("--save-memory keeps one conversation: give one prompt (in a chat, type /save FILE)")


def main(argv: Sequence[str] | None = None) -> int:
    # Intermixed: prompts may come after options.
    args = build_parser().parse_intermixed_args(argv)
    try:
        check(args)
        params = params_from(args)
        check_paths(args.path, args.base, args.adapter)
        set_environment_defaults()
        from rwkv_accel.generation.command import run

        return run(args, params)
    except UserError as error:
        return fail(error)
    except BrokenPipeError:
        return reader_left()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    run_program(main)
