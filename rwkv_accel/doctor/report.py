"""Findings and how they are shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One finding; WARN and FAIL say the remedy."""

    name: str
    status: Status
    text: str


def print_checks(checks: Sequence[Check]) -> int:
    """Print the findings; returns the exit code, 1 if one of them is a FAIL."""
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        sys.stdout.write(f"{check.status:<5} {check.name:<{width}}  {check.text}\n")
    failed = [check.name for check in checks if check.status == "FAIL"]
    sys.stdout.write(f"{'not fit: ' + ', '.join(dict.fromkeys(failed)) if failed else 'fit to train'}\n")
    sys.stdout.flush()
    return 1 if failed else 0


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() + "\n" for row in rows)
