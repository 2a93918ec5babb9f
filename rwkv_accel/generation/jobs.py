"""Batch jobs: one JSON object per line in, one per line out, in any amount, continued after a stop.

Input keys: `prompt` (required), any setting of SamplingParams (stop, seed, temperature, ...), `raw` (without the chat
template), `stop_set` (a name or a list of names). Every other key is copied to the output. Output: the input's keys
and `text`, `stop_reason`, `num_prompt_tokens`, `num_tokens`, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rwkv_accel.errors import UserError
from rwkv_accel.generation.engine import Completion, Request, TextGenerator
from rwkv_accel.generation.params import SamplingParams, stop_texts

_SETTINGS = tuple(field.name for field in fields(SamplingParams))
_TEXTS, _IDS = ("stop",), ("stop_ids", "ban_ids")
_WHOLE = ("max_new_tokens", "top_k", "seed")
_RESULTS = ("text", "stop_reason", "num_prompt_tokens", "num_tokens")


def run_job(
    generator: TextGenerator,
    source: Path,
    target: Path,
    params: SamplingParams,
    prepare: Callable[[str, bool], str],
    *,
    raw: bool = False,
    model_id: str = "",
) -> int:
    """Answer every line of `source` into `target`; returns how many lines are done (fewer if interrupted).

    The whole input is checked before the first token. Results are collected in `target.tmp` as they come; the final
    name appears when all are there. A new call with the same input goes on where an earlier one stopped. Line i
    without a seed gets params.seed + i. `prepare(prompt, raw)` makes the text that the model reads; `model_id` tells
    what answers from anything else that might.

    Raises:
        UserError: a line is broken (with file and line), source and target are one file, or the target's unfinished
            results are of another input, other settings or another model.
    """
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} would be written over the questions it is read from; give another --output")
    records = [_read_line(line, source, number) for number, line in _lines(source)]
    requests = [_request(record, params, raw, prepare, source, number) for number, record in enumerate(records)]
    part = target.with_name(target.name + ".tmp")
    job = hashlib.sha256(repr((model_id, params, raw)).encode()).hexdigest()
    done = _read_part(part, records, job)
    todo = [index for index in range(len(records)) if index not in done]
    with open(part, "a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps({"job": job}) + "\n")
        for piece in generator.run(requests[index] for index in todo):
            completion = piece.completion
            if completion is None or completion.stop_reason == "interrupted":
                continue
            index = todo[piece.index]
            done[index] = _result(records[index], completion)
            file.write(json.dumps([index, done[index]], ensure_ascii=False) + "\n")
            file.flush()
    if len(done) == len(records):
        _write_target(target, [done[index] for index in range(len(records))])
        part.unlink()
    return len(done)


def _lines(source: Path) -> Iterator[tuple[int, str]]:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"cannot read {source}: {reason}; give a JSONL file with a prompt per line") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{source} has no lines; write one JSON object with a prompt per line")
    yield from lines


def _read_line(line: str, source: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{number}: not valid JSON ({error.msg}); mend or remove the line") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{source}:{number}: needs a non-empty "prompt" text')
    if taken := sorted(set(record) & set(_RESULTS)):
        raise UserError(f"{source}:{number}: the key {taken[0]} is written by this program; rename it")
    return record


def _request(
    record: dict[str, Any],
    params: SamplingParams,
    raw: bool,
    prepare: Callable[[str, bool], str],
    source: Path,
    index: int,
) -> Request:
    settings: dict[str, Any] = {"seed": params.seed + index}
    try:
        for name in _SETTINGS:
            if name in record:
                settings[name] = _setting(name, record[name])
        if "stop_set" in record:
            settings["stop"] = stop_texts(_listed("stop_set", record["stop_set"], str, "a name or a list of names"))
        is_raw = record.get("raw", raw)
        if not isinstance(is_raw, bool):
            raise UserError(f"raw {is_raw!r} is not true or false")
        return Request(prepare(record["prompt"], is_raw), replace(params, **settings))
    except UserError as error:
        raise UserError(f"{source}: prompt {index + 1} ({record['prompt'][:40]!r}): {error}") from None


def _setting(name: str, value: Any) -> Any:
    """A value of a line as SamplingParams holds it; its bounds are checked there."""
    if name in _TEXTS:
        return _listed(name, value, str, "a text or a list of texts")
    if name in _IDS:
        return _listed(name, value, int, "a token id or a list of them")
    if name == "order":
        wanted, fits = "a text", isinstance(value, str)
    elif name in _WHOLE:
        wanted, fits = "a whole number", isinstance(value, int)
    else:
        wanted, fits = "a number", isinstance(value, int | float) or (name == "temperature" and value is None)
    if not fits or isinstance(value, bool):
        raise UserError(f"{name} {value!r} is not {wanted}")
    return value


def _listed(name: str, value: Any, kind: type, wanted: str) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, kind) and not isinstance(one, bool) for one in values):
        raise UserError(f"{name} {value!r} is not {wanted}")
    return tuple(values)


def _read_part(part: Path, records: list[dict[str, Any]], job: str) -> dict[int, dict[str, Any]]:
    """Results of an earlier, unfinished call. A line cut off by a crash does not count and is removed."""
    if not part.is_file():
        return {}
    done: dict[int, dict[str, Any]] = {}
    data = part.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    first, *lines = whole.decode("utf-8").split("\n")[:-1] or [""]
    if first and json.loads(first) != {"job": job}:
        raise UserError(
            f"{part} holds unfinished results of another model or of other settings; finish that job or remove the file"
        )
    for line in lines:
        index, result = json.loads(line)
        if index >= len(records) or {k: v for k, v in result.items() if k not in _RESULTS} != records[index]:
            raise UserError(f"{part} holds unfinished results of another input; finish that job or remove the file")
        done[index] = result
    if len(whole) < len(data):
        os.truncate(part, len(whole))
    return done


def _result(record: dict[str, Any], completion: Completion) -> dict[str, Any]:
    return {
        **record,
        "text": completion.text,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": len(completion.ids),
    }


def _write_target(target: Path, results: list[dict[str, Any]]) -> None:
    final = target.with_name(target.name + ".final.tmp")
    with open(final, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        file.flush()
        os.fsync(file.fileno())
    os.replace(final, target)
