"""Options that name a model, the same for every command that loads one. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from rwkv_accel.errors import UserError


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """PATH and the options around it; returns their group."""
    parser.add_argument("path", help="run folder (its newest save), adapter folder, or checkpoint file")
    model = parser.add_argument_group("model")
    model.add_argument("--base", help="base checkpoint, if not where the run or the adapter says")
    model.add_argument("--adapter", help="adapter folder that goes onto the checkpoint PATH")
    model.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="world, byte or the path of a Hugging Face tokenizer; default: what the run used, or by vocabulary",
    )
    model.add_argument("--precision", choices=("32-true", "bf16-true"), default="32-true")
    model.add_argument("--quant", choices=("nf4", "int8"), help="store a checkpoint's block matrices quantised")
    model.add_argument("--time-state", metavar="FILE", help="start every sequence from a state-tuning file's states")
    return model


def check_paths(*paths: str | None) -> None:
    """Raises UserError for a path that leads nowhere: before torch is loaded, which takes seconds."""
    for path in paths:
        if path is not None and not Path(path).exists():
            raise UserError(f"{path} does not exist; give a run folder, an adapter folder or a checkpoint file")
