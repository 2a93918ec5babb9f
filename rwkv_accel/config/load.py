"""Recipe file + `key.sub=value` overrides -> RunConfig. All problems are reported at once, in one line each."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rwkv_accel.config.base import section_of
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
    "logger": "tracking.trackers",
    "enable_progress_bar": "tracking.progress",
    "default_root_dir": "out_dir",
    "num_sanity_val_steps": "eval.at_start",
    "val_check_interval": "eval.every_n_steps",
    "check_val_every_n_epoch": "eval.every_n_epochs",
    "limit_val_batches": "eval.limit_batches",
}

# Names of Lightning's Trainer that are taken as they stand: (section, key) -> (section, key) of this schema.
SPELLINGS = {
    ("trainer", "val_check_interval"): ("eval", "every_n_steps"),
    ("trainer", "check_val_every_n_epoch"): ("eval", "every_n_epochs"),
    ("trainer", "limit_val_batches"): ("eval", "limit_batches"),
}

# What pydantic calls types of Python, in the words of YAML.
WORDS = {
    "tuple_type": "write a list, such as [a, b]",
    "dict_type": "write keys with values below it",
    "model_type": "write the keys of this section below it",
}

# Of a key that may hold several types pydantic names the one that it tried.
TYPE_NAME = re.compile(r"(str|int|float|tuple\[.*)$")

logger = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers have no base 60: 1:12:00:00 is a time, not 259200. A key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                place = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} stands there twice", place)
        return super().construct_mapping(node, deep)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    # JSON escapes what lies beyond 16 bits as two halves, which PyYAML leaves apart.
    text = str(loader.construct_scalar(node))
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        problem = "half of a surrogate pair stands there alone"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(r"(?!.*:)" + rule.pattern, re.X) if tag.endswith((":int", ":float")) else rule)
            for tag, rule in rules]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip


def leaf_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the schema that hold a value, in schema order."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
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
    _fill_empty(tree, RunConfig)
    problems += _respell(tree)
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
    if path.is_dir():
        raise UserError(f"recipe {path} is a folder; give the YAML file in it")
    if not path.is_file():
        first = "; the recipe comes first, then key.sub=value" if "=" in path.name else ""
        raise UserError(f"recipe {path} does not exist{_nearest_file(path)}{first}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise UserError(f"recipe {path} is empty; docs/recipes.md shows the shortest one")
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
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "the value cannot be read"
        return f"override {override!r} is not valid YAML ({reason}); quote what is a text"
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


def _fill_empty(tree: dict[str, Any], model: type[BaseModel]) -> None:
    """A section of which nothing is left but its name (`optim:`, all keys commented out) has the defaults."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and name in tree:
            if tree[name] is None and field.annotation is section:
                tree[name] = {}
            if isinstance(tree[name], dict):
                _fill_empty(tree[name], section)


def _respell(tree: dict[str, Any]) -> list[str]:
    """Put values under familiar names where they live here, saying so; problems where both names are given."""
    problems = []
    for (section, name), (home, key) in SPELLINGS.items():
        if not isinstance(tree.get(section), dict) or name not in tree[section]:
            continue
        value = tree[section].pop(name)
        target = tree.get(home)
        target = tree[home] = {} if target is None else target
        if not isinstance(target, dict) or key in target:
            problems.append(f"set one of {section}.{name} and {home}.{key}, which is its name here")
            continue
        target[key] = value
        logger.warning("%s.%s is %s.%s here; taken as that", section, name, home, key)
    return problems


def _describe(error: Any) -> str:
    loc = ".".join(str(part) for part in error["loc"] if not TYPE_NAME.match(str(part)))
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {loc}{_suggest(loc)}"
    if kind == "missing":
        return f"missing key {loc}: add it to the recipe or give {loc}=..."
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return message if message.startswith(("set ", f"{loc}.")) else f"{loc}: {message}" if loc else message
    shown = error.get("input")
    if kind in WORDS:
        return f"{loc}: {WORDS[kind]}, got {shown!r}"
    message = (error["msg"][0].lower() + error["msg"][1:]).replace("tuple", "list")
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
