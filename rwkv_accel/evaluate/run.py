"""From the command line to a recipe, and from its results to a table and files."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rwkv_accel.checkpoint.collective import on_main
from rwkv_accel.checkpoint.weights import RUN_FILE, run_folder_of
from rwkv_accel.config.load import load_config
from rwkv_accel.config.schema import RunConfig
from rwkv_accel.errors import UserError
from rwkv_accel.evaluation import EvalResult
from rwkv_accel.generation.loading import Source, find_source, load_generator_model, tokenizer_of
from rwkv_accel.generation.params import stop_texts
from rwkv_accel.run_setup import build_evaluator
from rwkv_accel.runtime import build_accelerator
from rwkv_accel.tasks.answers import AnswerResult
from rwkv_accel.tasks.choices import ChoiceRecord, ChoiceResult

Result = EvalResult | ChoiceResult | AnswerResult
KINDS = {EvalResult: "data", ChoiceResult: "choices", AnswerResult: "answers"}
WHOLE = ("target_tokens", "examples")


def run(args: argparse.Namespace) -> list[Result]:
    """Measure and report. Collective; every rank returns the same results.

    Weights are whole on every process, whatever the Accelerate file shards: only the work is shared.
    """
    source = find_source(args.path, base=args.base, adapter=args.adapter)
    config = recipe_for(args, source)
    accelerator = build_accelerator(config.trainer, 1)
    for path in filter(None, (args.json, args.details)):
        on_main(accelerator, lambda path=path: _check_folder(Path(path)))  # type: ignore[misc]
    evaluator = build_evaluator(config, accelerator)
    model, _ = load_generator_model(
        source,
        precision=args.precision,
        device=str(accelerator.device),
        tokenizer=config.data.tokenizer,
        quant=args.quant,
        time_state=args.time_state,
    )
    found = evaluator.run(accelerator, model)
    results: list[Result] = [*found.losses, *found.tasks]
    if accelerator.is_main_process:
        report(args, source, results, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return results


def recipe_for(args: argparse.Namespace, source: Source) -> RunConfig:
    """The recipe whose eval section says what is measured: the run's own, or defaults, with the options on top.

    Raises:
        UserError: there is nothing to measure, or a value is wrong.
    """
    run = _run_of(Path(args.path))
    files = {"path": args.data, "choices_path": args.choices, "answers_path": args.answers}
    given: dict[str, Any] = {"peft": {}, "model": {"path": str(source.base)}, "trainer.global_batch_size": None}
    given["data.tokenizer"] = args.tokenizer or tokenizer_of(source)
    if run is None:
        first = next((path for paths in files.values() for path in paths), "none")
        given.update({"out_dir": ".", "data.path": first, "data.template": source.template or "rwkv"})
    if any(files.values()):
        given["eval"] = {key: paths or None for key, paths in files.items()}
    stop = (*stop_texts(tuple(args.stop or ())), *args.stop_text)
    for key, value in (
        ("eval.limit_examples", args.limit),
        ("data.ctx_len", args.ctx_len),
        ("data.template", args.template),
        ("eval.answers_regex", args.regex),
        ("eval.answers_normalize", args.normalize),
        ("eval.answers_max_new_tokens", args.max_new_tokens),
        ("eval.answers_stop", list(stop) if args.stop or args.stop_text else None),
    ):
        if value is not None:
            given[key] = value
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    config = load_config(None if run is None else run / RUN_FILE, [*overrides, *args.overrides])
    if not config.eval.is_on:
        why = "a checkpoint has no recipe" if run is None else f"the recipe of {run} has no eval section with data"
        raise UserError(f"there is nothing to measure ({why}); give --data, --choices or --answers")
    return config


def report(args: argparse.Namespace, source: Source, results: Sequence[Result], num_processes: int) -> None:
    """Table on stdout, and the files that were asked for."""
    print(table(results))  # noqa: T201
    if args.json:
        document = {
            "model": args.path,
            "base": str(source.base),
            "adapter": None if source.adapter is None else str(source.adapter),
            "precision": args.precision,
            "quant": args.quant,
            "processes": num_processes,
            "results": [{"set": r.name, "kind": KINDS[type(r)], **r.values()} for r in results],
        }
        _write(Path(args.json), json.dumps(document, indent=1) + "\n")
    if args.details:
        lines = [_details(result) for result in results if not isinstance(result, EvalResult)]
        _write(Path(args.details), "".join(lines))


def table(results: Sequence[Result]) -> str:
    """Set, measure and value, one measure per line."""
    rows = [("set", "measure", "value")]
    for result in results:
        for index, (name, value) in enumerate(result.values().items()):
            shown = f"{value:,.0f}" if name in WHOLE else f"{value:.6f}"
            rows.append(("" if index else result.name, name.replace("_", " "), shown))
    first, second, third = (max(map(len, column)) for column in zip(*rows))
    lines = [f"{a:{first}}  {b:{second}}  {c:>{third}}" for a, b, c in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _details(result: ChoiceResult | AnswerResult) -> str:
    lines = []
    for record in result.records:
        verdict = {"chosen": record.chosen} if isinstance(record, ChoiceRecord) else {"right": record.is_right}
        lines.append(json.dumps({"set": result.name, **asdict(record), **verdict}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _run_of(path: Path) -> Path | None:
    """The run folder that PATH is or lies in."""
    if (path / RUN_FILE).is_file():
        return path
    return run_folder_of(path) if path.is_dir() else None


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UserError(f"{path} cannot be written: its folder does not exist, or it is a folder; choose another file")


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another file") from None
