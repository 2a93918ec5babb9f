"""Recipe file + `key.sub=value` overrides -> RunConfig. All problems are reported at once, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rwkv_accel.config.schema import RunConfig
from rwkv_accel.errors import UserError

# Names that users of other RWKV trainers and of Lightning know, and where they live here.
KNOWN_ELSEWHERE = {
    "lr": "optim.lr_init",
    "learning_rate": "optim.lr_init",
    "epochs": "trainer.max_epochs",
    "epoch_count": "trainer.max_epochs",
    "micro_bsz": "trainer.micro_batch_size",
    "batch_size": "trainer.micro_batch_size",
    "accum": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "grad_clip": "trainer.gradient_clip_val",
    "grad_cp": "trainer.gradient_checkpointing",
    "data_file": "data.path",
    "load_model": "model.path",
    "proj_dir": "out_dir",
    "random_seed": "trainer.seed",
    "lora_r": "peft.rank",
    "r": "peft.rank",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "target_modules": "peft.targets",
    "n_layer": "model.init.n_layer",
    "n_embd": "model.init.n_embd",
    "wandb": "tracking.trackers",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "adam_eps": "optim.eps",
}


def leaf_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the schema that hold a value, in schema order."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        keys += leaf_keys(section, f"{prefix}{name}.") if section else [prefix + name]
    return keys


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides (schema default < recipe < override).

    Raises:
        UserError: the file cannot be read, or any key or value is wrong; the message lists every problem.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(tree, override)
        if problem:
            problems.append(problem)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_describe(e) for e in error.errors()]
    if problems:
        raise UserError("\n".join(problems))
    return config


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as YAML that load_config reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist{_nearest_file(path)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} holds {type(tree).__name__}, not sections like `model:` and `data:`")
    return tree


def _nearest_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    key, sep, text = override.partition("=")
    if not sep or not key or key.startswith("-"):
        return f"override {override!r} is not of the form key.sub=value, for example optim.lr_init=2e-5"
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return f"override {override!r}: the value is not valid YAML; quote it"
    *sections, last = key.split(".")
    node: Any = tree
    for name in sections:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            return f"override {override!r}: {name} is a value, not a section"
    node[last] = value
    return None


def _describe(error: Any) -> str:
    loc = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {loc}{_suggest(loc)}"
    if kind == "missing":
        return f"missing key {loc}: add it to the recipe or give {loc}=..."
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return message if message.startswith(("set ", f"{loc}.")) else f"{loc}: {message}" if loc else message
    shown = error.get("input")
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{loc}: {message}, got {shown!r}"


def _suggest(loc: str) -> str:
    leaves = leaf_keys()
    last = loc.rsplit(".", 1)[-1]
    if last in KNOWN_ELSEWHERE:
        return f"; here it is {KNOWN_ELSEWHERE[last]}"
    near = difflib.get_close_matches(loc, [*leaves, *_sections(leaves)], 1, cutoff=0.7)
    if not near:
        by_last = {**KNOWN_ELSEWHERE, **{leaf.rsplit(".", 1)[-1]: leaf for leaf in leaves}}
        near = [by_last[m] for m in difflib.get_close_matches(last, by_last, 1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else "; see --print-config for all keys"


def _sections(leaves: Iterable[str]) -> list[str]:
    return sorted({leaf.rsplit(".", 1)[0] for leaf in leaves if "." in leaf})


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
