"""The reference of all keys as Markdown, made from the schema. `python -m rwkv_accel.config` prints docs/config.md."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from rwkv_accel.config.base import CountOrShare, section_of
from rwkv_accel.config.schema import RunConfig

HEAD = """# Keys of a recipe

Made from the schema by `python -m rwkv_accel.config > docs/config.md`; a test compares the two. Every key can be given
on the command line as `section.key=value`; None is written `null`. `--print-config` of the trainer shows the values
that a recipe resolves to.
"""
_SHARE = next(value for value in get_args(CountOrShare) if isinstance(value, AfterValidator))
_SIGNS = ((bounds.Gt, "gt", ">"), (bounds.Ge, "ge", ">="), (bounds.Lt, "lt", "<"), (bounds.Le, "le", "<="))


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section(RunConfig, "")])


def _section(model: type[BaseModel], name: str) -> Iterator[str]:
    values = {key: field for key, field in model.model_fields.items() if section_of(field.annotation) is None}
    yield f"## {name}" if name else "## Top level"
    yield ""
    yield " ".join((model.__doc__ or "").split())
    yield ""
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in values.items():
        meaning = " ".join((field.description or "").split())
        cells = (f"`{key}`", type_text(field.annotation, field.metadata), _default(field), meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for key, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from _section(section, f"{name}.{key}" if name else key)


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type with its bounds, in the words of YAML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(args[0], args[1:])
    if _SHARE in metadata:
        return "number, or share up to 1.0"
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(arg, metadata if arg is not type(None) else ()) for arg in args)
    if origin is tuple:
        parts = [arg for arg in args if arg is not Ellipsis]
        return f"list of {type_text(parts[0])}" if Ellipsis in args else f"[{', '.join(map(type_text, parts))}]"
    if origin is dict:
        return f"map of {type_text(args[0])} to {type_text(args[1])}"
    if annotation is type(None):
        return "`null`"
    name = {"str": "text", "bool": "`true`, `false`", "Any": "anything"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )
    limits = [
        f"{sign} {getattr(item, attribute):g}"
        for item in _flat(metadata)
        for kind, attribute, sign in _SIGNS
        if isinstance(item, kind)
    ]
    return " ".join([name, " and ".join(limits)]).strip()


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)
