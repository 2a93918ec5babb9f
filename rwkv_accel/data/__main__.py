"""Look at data before training on it: python -m rwkv_accel.data preview|lint|stats|convert SOURCE ..."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail, reader_left, run_program

if TYPE_CHECKING:
    from rwkv_accel.data.documents import Document


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.data",
        description="Look at training data the way a run will see it.",
        epilog="Example: python -m rwkv_accel.data preview chats.jsonl data.prompt_column=question "
        "data.response_column=answer",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("source", help="recipe (.yaml), or anything that data.path can be")
    preview = commands.add_parser("preview", parents=[source], help="show documents, tokens coloured by the loss mask")
    preview.add_argument("-n", "--num-documents", type=int, default=3, help="how many (default 3)")
    preview.add_argument("--skip", type=int, default=0, help="documents to pass over first")
    preview.add_argument("--batch", type=Path, help="the documents of a file that a skipped update left in out_dir")
    preview.add_argument("--html", type=Path, help="write a page to this file instead")
    preview.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    lint = commands.add_parser("lint", parents=[source], help="find faults; exit code 1 if there are errors")
    lint.add_argument("--vocab-size", type=int, help="embedding rows of the model (default: the tokenizer's)")
    stats = commands.add_parser("stats", parents=[source], help="lengths, tokens, rows and updates per epoch")
    stats.add_argument("--processes", type=int, default=1, help="processes that will train (default 1)")
    convert = commands.add_parser("convert", parents=[source], help="write .bin (binidx), .arrow, .parquet or .jsonl")
    convert.add_argument("target", type=Path, help="file to write; its suffix says the kind")
    for command in (preview, lint, stats, convert):
        command.add_argument("overrides", nargs="*", metavar="data.key=value", help="values that replace the recipe's")
    # Overrides may follow the options, where argparse takes them for something unknown.
    args, rest = parser.parse_known_args(argv)
    if unknown := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides += rest
    if args.command == "convert" and "=" in args.target.name:
        parser.error(f"convert needs the file to write before {args.target}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = read_config(args.source, args.overrides)
        if config.data.is_endless and args.command in ("lint", "stats"):
            raise UserError(f"{args.command} reads everything, and a stream may have no end: set data.max_documents")
        return {"preview": run_preview, "lint": run_lint, "stats": run_stats, "convert": run_convert}[args.command](
            args, config
        )
    except UserError as error:
        return fail(error)
    except BrokenPipeError:
        return reader_left()


def read_config(source: str, overrides: Sequence[str]) -> RunConfig:
    """A recipe, or a recipe around a data path."""
    if source.endswith((".yaml", ".yml")):
        return load_config(source, overrides)
    # A stream needs a number of steps, which nothing here asks for.
    around = ["out_dir=none", "model.path=none", "trainer.max_steps=1", f"data.path={json.dumps(source)}"]
    return load_config(None, [*around, *overrides])


def run_preview(args: argparse.Namespace, config: RunConfig) -> int:
    from rwkv_accel.data.corpus import read_documents
    from rwkv_accel.data.documents import ReadReport
    from rwkv_accel.data.preview import preview_html, preview_text
    from rwkv_accel.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.data.tokenizer)
    documents = read_documents(config.data, tokenizer, ReadReport())
    chosen: Iterator[Document] = islice(documents, args.skip, args.skip + args.num_documents)
    if args.batch:
        wanted = documents_of_batch(args.batch)
        numbered = enumerate(islice(documents, max(wanted) + 1))
        chosen = (document for number, document in numbered if number in wanted)
    first = next(chosen, None)
    if first is None:
        raise UserError(f"data.path {config.data.shown_path} holds no documents{' after these' if args.skip else ''}")
    shown = chain([first], chosen)
    if args.html:
        try:
            args.html.write_text(preview_html(shown, tokenizer), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.html}: {error.strerror}") from None
        write_lines([f"written to {args.html}"])
        return 0
    colour = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    write_lines(preview_text(shown, tokenizer, colour=colour))
    return 0


def documents_of_batch(path: Path) -> set[int]:
    """Numbers of the documents that a skipped update's file lists.

    Raises:
        UserError: it is no such file, or its data has no documents to show.
    """
    try:
        batches = json.loads(path.read_bytes())["batches"]
        wanted = {int(document) for batch in batches for document in batch["documents"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--batch {path} is not the file of a skipped update ({error})") from None
    if not wanted:
        raise UserError(f"--batch {path} lists no documents: the data is a stream or one flat run of tokens")
    return wanted


def run_lint(args: argparse.Namespace, config: RunConfig) -> int:
    from rwkv_accel.data.lint import has_errors, lint, lint_lines
    from rwkv_accel.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.data.tokenizer)
    init_size = config.model.init.vocab_size if config.model.init else None
    num_documents, findings = lint(config.data, tokenizer, args.vocab_size or init_size or tokenizer.vocab_size)
    write_lines(lint_lines(num_documents, findings))
    return 1 if has_errors(findings) else 0


def run_stats(args: argparse.Namespace, config: RunConfig) -> int:
    from rwkv_accel.data.stats import stats_lines
    from rwkv_accel.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(config.data.tokenizer)
    write_lines(stats_lines(config.data, config.trainer, tokenizer, args.processes))
    return 0


def run_convert(args: argparse.Namespace, config: RunConfig) -> int:
    from rwkv_accel.data.convert import convert
    from rwkv_accel.data.tokenizer import build_tokenizer

    write_lines(convert(config.data, build_tokenizer(config.data.tokenizer), args.target))
    return 0


def write_lines(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    run_program(main)
