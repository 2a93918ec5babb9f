"""Turn a run, an adapter or a checkpoint into files for other programs: python -m rwkv_accel.export SOURCE --to KIND"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rwkv_accel.errors import UserError
from rwkv_accel.generation.flags import check_paths
from rwkv_accel.runtime import fail, run_program, set_environment_defaults

KINDS = {
    "pth": "merged model in the official names, .pth",
    "safetensors": "the same as .safetensors",
    "fla": "merged model as a Hugging Face rwkv7 folder (fla names, config.json)",
    "hf-peft": "HF PEFT adapter folder",
    "state": "initial WKV states (blocks.i.att.time_state), .pth",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.export",
        description="Merge and convert. Every export is checked against the model that it came from before it gets "
        "its final name.",
        epilog="kinds: " + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items()),
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="source",
        help="run folder (its newest save), adapter folder, HF PEFT folder, flat adapter .pth of RWKV-PEFT, or a "
        "checkpoint; several adapters of one base are added up",
    )
    parser.add_argument("--to", required=True, choices=KINDS, help="what to write")
    parser.add_argument("--out", help="file or folder to write; default: a fixed name in the source's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--base", help="base checkpoint, if not where the run or the adapter says")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="factor on each adapter; default 1")
    parser.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="adapter of a quantised base: merge onto the weights it was trained on (the same outputs), or onto the "
        "unquantised ones",
    )
    parser.add_argument("--dtype", choices=("keep", "fp32", "bf16", "fp16"), default="keep", help="of merged weights")
    parser.add_argument("--names", choices=("official", "fla"), default="official", help="module paths in hf-peft")
    parser.add_argument("--alpha", type=float, help="alpha of a flat .pth, which does not say it")
    parser.add_argument("--method", choices=("lora", "pissa"), help="pissa: a flat .pth with init_pissa.pth beside it")
    parser.add_argument("--probe", default="User: What is a state?\n\nAssistant:", help="text of the check")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        check_paths(*args.sources, args.base)
        set_environment_defaults()
        from rwkv_accel.export.run import export

        report = export(
            args.sources,
            to=args.to,
            out=args.out,
            overwrite=args.overwrite,
            base=args.base,
            weights=args.weights,
            onto_original=args.onto == "original",
            dtype=args.dtype,
            names=args.names,
            method=args.method,
            alpha=args.alpha,
            probe=args.probe,
        )
    except UserError as error:
        return fail(error)
    print(report)  # noqa: T201
    return 0


if __name__ == "__main__":
    run_program(main)
