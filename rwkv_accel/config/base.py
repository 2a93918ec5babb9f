"""What every section of a recipe shares."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def _count_or_share(value: int | float) -> int | float:
    if isinstance(value, float) and not value <= 1 and value == int(value):
        value = int(value)
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"write a number (1, 2, ...) or a share above 0 and at most 1.0, not {value}")
    return value


CountOrShare = Annotated[int | float, AfterValidator(_count_or_share)]
"""3 is three, 0.5 is a half, 1.0 is all."""


def _expand(path: str) -> str:
    if not path.strip():
        raise ValueError("the path is empty; write one, . for the current folder")
    path = os.path.expanduser(os.path.expandvars(path))
    if (unset := re.search(r"\$(\w+|\{\w+\})", path)) is not None:
        raise ValueError(f"the environment has no variable {unset[1].strip('{}')}; set it, or write the path out")
    return path


def _expand_all(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return _expand(paths) if isinstance(paths, str) else tuple(map(_expand, paths))


PathText = Annotated[str, AfterValidator(_expand)]
"""A file, a folder or a URL; `~` and `$NAME` stand for what they do in a shell."""
PathTexts = Annotated[str | tuple[str, ...], AfterValidator(_expand_all)]
"""One, or several of them."""


def share_of(limit: int | float | None, whole: int) -> int:
    """How many of `whole` a number or a share allows: shares are rounded down, but not to nothing."""
    if limit is None:
        return whole
    return max(1, int(limit * whole)) if isinstance(limit, float) else min(limit, whole)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, if it is one (or None)."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


class Strict(BaseModel):
    """Base of every section: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
