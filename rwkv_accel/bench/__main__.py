"""Measure speed and memory: python -m rwkv_accel.bench [case ...] [--json FILE]"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_accel.bench import CASES
from rwkv_accel.errors import UserError
from rwkv_accel.runtime import fail

if TYPE_CHECKING:
    from rwkv_accel.bench.harness import Row


def main(argv: Sequence[str] | None = None) -> int:
    listing = "\n".join(f"  {name:12} {what}" for name, (_, what) in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_accel.bench",
        description="Measure speed and memory. Ratios compare with a named baseline within the same run.",
        epilog=f"cases:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cases", nargs="*", metavar="case", help="what to measure (default: everything but kernels)")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--tune", action="store_true", help="wkv7 on cuda: find the kernels' sizes first, keep them")
    args = parser.parse_intermixed_args(argv)
    if args.list:
        print(listing)
        return 0
    unknown = [name for name in args.cases if name not in CASES]
    if unknown or args.repeats < 1 or args.threads < 1:
        problem = f"no case {unknown[0]}; there are {', '.join(CASES)}" if unknown else "--repeats and --threads: >= 1"
        return fail(UserError(problem))
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    import torch

    from rwkv_accel.bench.harness import Options, ParityError, hardware

    if args.device == "cuda" and not torch.cuda.is_available():
        return fail(UserError("--device cuda: no GPU is visible here; these rows stay not measured"))
    torch.set_num_threads(args.threads)
    options = Options(args.repeats, args.threads, args.device, args.tune)
    print(hardware(options))
    print("\n| case | what | value | baseline | ratio |\n|---|---|---|---|---|")
    rows: dict[str, list[dict[str, object]]] = {}
    failed = False
    for name in args.cases or [name for name in CASES if name != "kernels"]:
        module, _ = CASES[name]
        rows[name] = []
        try:
            for row in importlib.import_module(module).measure(options):
                _show(name, row)
                rows[name].append(asdict(row))
                _write(args.json, hardware(options), rows)
        except UserError as error:  # a baseline that is not installed
            print(f"| {name} | not measured: {error} | | | |", flush=True)
        except ParityError as error:
            failed = True
            print(f"| {name} | **not reported: the candidates disagree** {error} | | | |", flush=True)
        except Exception as error:  # noqa: BLE001  (what other cases measure must not be lost with it)
            failed = True
            traceback.print_exc()
            print(f"| {name} | **failed** {type(error).__name__}: {_one_line(error)} | | | |", flush=True)
    _write(args.json, hardware(options), rows)
    return 1 if failed else 0


def _show(case: str, row: Row) -> None:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    note = f" ({row.note})" if row.note else ""
    print(f"| {case} | {row.name}{note} | {row.value:,.4g} {row.unit} | {row.baseline} | {ratio} |", flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _write(path: Path | None, machine: str, rows: dict[str, list[dict[str, object]]]) -> None:
    """After every row: what comes next may take the process down."""
    if path is None:
        return
    document = {"hardware": machine, "rows": {case: found for case, found in rows.items() if found}}
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


if __name__ == "__main__":
    sys.exit(main())
