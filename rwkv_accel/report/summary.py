"""A run in words and numbers: the cards on top of the page and the table that compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rwkv_accel.report.series import Numbers, number
from rwkv_accel.report.timeline import Timeline
from rwkv_accel.tracking.progress import duration

GIB = 1 << 30
NOT_FINITE = "not finite"


def headline(columns: dict[str, Numbers], evals: list[dict[str, Any]], timeline: Timeline) -> list[dict[str, str]]:
    """Cards: {label, value, note}."""
    cards = [{"label": "status", "value": timeline.state, "note": _steps_note(columns, timeline)}]
    if (lost := _lost_since(columns)) is not None:
        cards.append({"label": "training loss", "value": NOT_FINITE, "note": f"since step {lost:,}"})
    elif (loss := _last(columns, "smoothed_loss")) is not None:
        cards.append({"label": "training loss", "value": f"{loss:.4f}", "note": "smoothed"})
    if best := best_eval(evals):
        value, step, name = best
        cards.append({"label": "best validation loss", "value": f"{value:.4f}", "note": f"{name}, step {step:,}"})
    if tokens := _last(columns, "tokens_seen"):
        cards.append({"label": "tokens", "value": human(tokens), "note": f"{_share(columns)} of them targets"})
    if (speed := mean_speed(columns)) is not None:
        cards.append({"label": "throughput", "value": f"{speed:.2f} Kt/s", "note": "mean, without pauses"})
    if seconds := _last(columns, "seconds"):
        cards.append({"label": "wall time", "value": duration(seconds), "note": f"since {timeline.started}"})
    return cards


def summary(
    columns: dict[str, Numbers],
    evals: list[dict[str, Any]],
    config: dict[str, str],
    environment: dict[str, Any],
    timeline: Timeline,
) -> dict[str, str]:
    """Label -> text; what is not known is left out."""
    facts: dict[str, str | None] = {
        "status": timeline.state,
        "started": timeline.started,
        "starts": _starts(timeline),
        "steps": _count(_last(columns, "step")),
        "epoch": _with(_last(columns, "epoch"), "{:.0f} (the first is 0)"),
        "last loss": _last_loss(columns),
        "smoothed loss": _decimals(_last(columns, "smoothed_loss")),
        **_last_results(evals),
        "best validation loss": f"{best[0]:.4f} at step {best[1]:,}" if (best := best_eval(evals)) else None,
        "tokens": _count(_last(columns, "tokens_seen")),
        "target tokens": _count(sum(value or 0 for value in columns.get("target_tokens", []))),
        "throughput": _with(mean_speed(columns), "{:.2f} Kt/s"),
        "waiting for data": _with(_mean(columns, "wait_share"), "{:.1%}"),
        "largest gradient norm": _decimals(_largest(columns, "grad_norm")),
        "peak memory": _with((_largest(columns, "memory_bytes") or 0) / GIB or None, "{:.2f} GiB"),
        "wall time": duration(seconds) if (seconds := _last(columns, "seconds")) else None,
        **_model(config, environment),
        **_software(environment),
    }
    return {label: str(text) for label, text in facts.items() if text}


def best_eval(evals: list[dict[str, Any]]) -> tuple[float, int, str] | None:
    """(loss, step, set) of the lowest loss on the first set, which is the one that decides."""
    if not evals:
        return None
    first = evals[0].get("set")
    losses = [
        (loss, record["step"]) for record in evals if record.get("set") == first
        if (loss := number(record.get("loss"))) is not None
    ]  # fmt: skip
    return (*min(losses), str(first or "validation")) if losses else None


def mean_speed(columns: dict[str, Numbers]) -> float | None:
    """Thousands of tokens per second of training time over the whole run."""
    rows = [
        (tokens, speed) for tokens, speed in zip(columns.get("tokens", []), columns.get("kt_s", [])) if tokens and speed
    ]
    seconds = sum(tokens / speed / 1000 for tokens, speed in rows)
    return sum(tokens for tokens, _ in rows) / seconds / 1000 if seconds else None


def human(count: float) -> str:
    """1.23M and the like."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _model(config: dict[str, str], environment: dict[str, Any]) -> dict[str, str | None]:
    model = environment.get("model")
    facts: dict[str, str | None] = {"model": config.get("model.path") or None}
    if facts["model"] == "null":
        facts["model"] = "new weights"
    if isinstance(model, dict):
        facts |= {label.replace("_", " "): _shown(value) for label, value in model.items()}
    if (method := config.get("peft.method")) is not None:
        rank = config.get("peft.rank")
        facts["method"] = method if method in ("full", "state", "parts") or rank is None else f"{method}, rank {rank}"
    facts["precision"] = config.get("trainer.precision")
    facts["data"] = config.get("data.path")
    return facts


def _software(environment: dict[str, Any]) -> dict[str, str | None]:
    packages = environment.get("packages")
    gpus = environment.get("gpus")
    commit = environment.get("git_commit")
    version = environment.get("rwkv_accel")
    facts = {
        "processes": _shown(environment.get("world_size")),
        "GPUs": ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else None,
        "rwkv_accel": f"{version} ({str(commit)[:10]})" if commit else _shown(version),
        "python": _shown(environment.get("python")),
    }
    if isinstance(packages, dict):
        facts["packages"] = ", ".join(f"{name} {text}" for name, text in packages.items())
    return facts


def _steps_note(columns: dict[str, Numbers], timeline: Timeline) -> str:
    step = _last(columns, "step")
    text = "no records yet" if step is None else f"step {step:,.0f}"
    return text + (f", {timeline.num_starts} starts" if timeline.num_starts > 1 else "")


def _starts(timeline: Timeline) -> str | None:
    if timeline.num_starts < 2:
        return None
    return f"{timeline.num_starts}: " + ", ".join(text for _, text in timeline.marks)


def _lost_since(columns: dict[str, Numbers]) -> int | None:
    """First step of the records at the end of a run that have no finite loss."""
    steps = columns["step"]
    losses = columns.get("loss", [None] * len(steps))
    num_lost = next((n for n, loss in enumerate(reversed(losses)) if loss is not None), len(losses))
    return int(steps[-num_lost] or 0) if num_lost else None


def _last_loss(columns: dict[str, Numbers]) -> str | None:
    finite, lost = _decimals(_last(columns, "loss")), _lost_since(columns)
    if lost is None:
        return finite
    return f"{NOT_FINITE} since step {lost:,}" + (f", {finite} before" if finite else "")


def _share(columns: dict[str, Numbers]) -> str:
    targets, tokens = (sum(value or 0 for value in columns.get(name, [])) for name in ("target_tokens", "tokens"))
    return f"{targets / tokens:.0%}" if tokens else "unknown share"


def _last_results(evals: list[dict[str, Any]]) -> dict[str, str | None]:
    """What was measured last on each set, without what was counted."""
    newest = {str(record.get("set", "validation")): record for record in evals}
    return {
        f"{name}: {key.replace('_', ' ')}": _decimals(number(value))
        for name, record in newest.items()
        for key, value in record.items()
        if key not in ("step", "epoch", "set", "target_tokens", "examples")
    }


def _known(columns: dict[str, Numbers], name: str) -> Sequence[float]:
    return [value for value in columns.get(name, []) if value is not None]


def _last(columns: dict[str, Numbers], name: str) -> float | None:
    known = _known(columns, name)
    return known[-1] if known else None


def _largest(columns: dict[str, Numbers], name: str) -> float | None:
    return max(_known(columns, name), default=None)


def _mean(columns: dict[str, Numbers], name: str) -> float | None:
    known = _known(columns, name)
    return sum(known) / len(known) if known else None


def _with(value: float | None, pattern: str) -> str | None:
    return None if value is None else pattern.format(value)


def _decimals(value: float | None) -> str | None:
    return _with(value, "{:.4f}" if value is None or abs(value) < 1e5 else "{:.4g}")


def _count(value: float | None) -> str | None:
    return _with(value, "{:,.0f}")


def _shown(value: Any) -> str | None:
    if value is None or isinstance(value, dict | list):
        return None
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
