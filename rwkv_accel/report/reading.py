"""What a run folder says, as the JSON-ready dict that the page draws. Whatever is missing or damaged is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rwkv_accel.config.schema import RunConfig
from rwkv_accel.errors import UserError
from rwkv_accel.report.series import (
    SECONDS,
    TOKENS,
    Numbers,
    chosen_rows,
    columns_of,
    rising,
    running_sum,
    short,
    value_at,
)
from rwkv_accel.report.summary import headline, summary
from rwkv_accel.report.timeline import read_timeline
from rwkv_accel.tracking import ENVIRONMENT_FILE, EVAL_FILE, LOSS_FILE, RUN_FILE, SAMPLES_FILE, TRAIN_LOG_FILE
from rwkv_accel.tracking.loss_json import read_records

TOKEN_LOSS_FILE = "token_losses.json"
# Any of these makes a folder a run.
READ_FILES = (RUN_FILE, ENVIRONMENT_FILE, LOSS_FILE, EVAL_FILE, SAMPLES_FILE, TRAIN_LOG_FILE, TOKEN_LOSS_FILE)
NUM_POINTS = 4000


def check_is_run(folder: Path) -> None:
    """Raises UserError for a folder that no run has written into."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the out_dir of a run")
    if not any((folder / name).is_file() for name in READ_FILES):
        raise UserError(f"{folder} holds no run (no {RUN_FILE}, no {LOSS_FILE}); give the out_dir of a run")


def read_run(folder: Path, name: str, num_points: int = NUM_POINTS) -> dict[str, Any]:
    """Everything about one run. num_points: most points of a curve; long runs keep their extremes."""
    records, num_damaged = read_records(folder / LOSS_FILE)
    records = _in_order(records)
    evals, samples = read_records(folder / EVAL_FILE)[0], read_records(folder / SAMPLES_FILE)[0]
    recipe, environment = _mapping(folder / RUN_FILE), _mapping(folder / ENVIRONMENT_FILE)
    timeline = read_timeline(folder)
    columns = columns_of(records) or {"step": []}
    axes = _Axes(columns)
    rows = chosen_rows(columns, num_points)
    columns |= {"tokens_seen": list(axes.tokens), "seconds": list(axes.seconds)}
    config = flat(recipe)
    facts = summary(columns, evals, config, environment, timeline)
    return {
        "name": name,
        "path": str(folder),
        "num_records": len(records),
        "columns": {key: short([values[row] for row in rows]) for key, values in columns.items()},
        "evals": _evals(evals, axes),
        "marks": [{**axes.at(step), "text": text} for step, text in timeline.marks],
        "samples": [_sample(record) for record in samples],
        "headline": headline(columns, evals, timeline),
        "summary": facts,
        "config": config,
        "changed": _changed(config),
        "messages": timeline.messages,
        "events": timeline.events,
        "notes": _notes(columns, num_damaged, len(records), len(rows)),
        "token_losses": _token_losses(_mapping(folder / TOKEN_LOSS_FILE)),
    }


def names_of(folders: list[Path]) -> list[str]:
    """Short names of the runs: the folder's, with as many parents as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Nested sections as dotted keys with JSON values."""
    if isinstance(tree, dict) and (tree or not prefix):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, default=str)}


class _Axes:
    """Steps against tokens and seconds."""

    def __init__(self, columns: dict[str, Numbers]):
        self.steps = [step or 0 for step in columns["step"]]
        self.tokens = running_sum(columns.get(TOKENS, [0] * len(self.steps)))
        self.seconds = rising(columns.get(SECONDS, [0] * len(self.steps)))

    def at(self, step: float) -> dict[str, float]:
        tokens, seconds = (value_at(step, self.steps, values) for values in (self.tokens, self.seconds))
        return {"step": step, "tokens_seen": round(tokens), "seconds": round(seconds, 3)}


def _in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per step, by step: whoever joined files by hand must not get curves that run backwards."""
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def _evals(records: list[dict[str, Any]], axes: _Axes) -> list[dict[str, Any]]:
    sets: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        sets.setdefault(str(record.get("set", "validation")), []).append(record)
    found = []
    for name, of_set in sets.items():
        columns = columns_of(_in_order(of_set))
        at = [axes.at(step or 0) for step in columns["step"]]
        columns |= {key: [place[key] for place in at] for key in ("tokens_seen", "seconds")}
        found.append({"set": name, "columns": {key: short(values) for key, values in columns.items()}})
    return found


def _sample(record: dict[str, Any]) -> dict[str, Any]:
    answers = record.get("samples")
    known = [answer for answer in answers if isinstance(answer, dict)] if isinstance(answers, list) else []
    return {
        "step": record["step"],
        "answers": [
            {
                "prompt": str(answer.get("prompt", "")),
                "text": str(answer.get("text", "")),
                "stopped": bool(answer.get("stopped")),
            }
            for answer in known
        ],
    }


def _token_losses(tree: dict[str, Any]) -> dict[str, Any] | None:
    """What `--tokens` has left; None where it has left nothing."""
    documents = tree.get("documents")
    return tree if isinstance(documents, list) and documents else None


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; empty when it is missing or half written."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _changed(config: dict[str, str]) -> list[str]:
    """Keys whose value is not the schema's default."""
    defaults: dict[str, str] = {}
    for name, field in RunConfig.model_fields.items():
        sections = getattr(field.annotation, "model_fields", None)
        if sections is None:
            continue
        tree = {
            key: getattr(default, "model_dump", lambda default=default, **_: default)(mode="json")
            for key, inner in sections.items()
            if not inner.is_required()
            for default in [inner.get_default(call_default_factory=True)]
        }
        defaults |= flat({name: tree})
    return [key for key, value in config.items() if key not in defaults or defaults[key] != value]


def _notes(columns: dict[str, Numbers], num_damaged: int, num_records: int, num_rows: int) -> list[str]:
    """What a reader of the curves must know."""
    notes = []
    losses = columns.get("loss", [None] * len(columns["step"]))
    lost = [int(step or 0) for step, loss in zip(columns["step"], losses) if loss is None]
    if lost:
        notes.append(f"{len(lost)} of {num_records} records have no finite loss, the first at step {lost[0]}")
    if num_damaged:
        notes.append(f"{LOSS_FILE}: {num_damaged} damaged records are left out")
    if num_rows < num_records:
        notes.append(f"{num_records:,} records, drawn as {num_rows:,} points that keep every stretch's extremes")
    return notes
