"""The page: one HTML file with its style, its script and its data inside, which nothing else may run in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rwkv_accel.errors import UserError
from rwkv_accel.report.reading import NUM_POINTS, check_is_run, names_of, read_run

STATIC = Path(__file__).parent / "static"
SCRIPTS = ("format.js", "scale.js", "chart.js", "sections.js", "app.js")


def write_report(folders: Sequence[Path], output: Path, num_points: int = NUM_POINTS) -> Path:
    """Write the page about these runs.

    Raises:
        UserError: a folder is no run, or the file cannot be written.
    """
    text = page(read_runs(folders, num_points))
    part = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; choose another --output") from None
    return output


def read_runs(folders: Sequence[Path], num_points: int = NUM_POINTS) -> dict[str, Any]:
    """The data of the page. Raises UserError for a folder that is no run."""
    # The same folder twice is one run.
    unique = list({folder.resolve(): folder for folder in folders}.values())
    for folder in unique:
        check_is_run(folder)
    runs = [read_run(folder, name, num_points) for folder, name in zip(unique, names_of(unique))]
    return {"made": datetime.now().isoformat(" ", "seconds"), "runs": runs}


def page(data: dict[str, Any], *, is_live: bool = False) -> str:
    """The whole HTML. is_live: the page asks its server for news."""
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # Text of a run ends up in the page as data only, and the policy names the one script that may run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    server = "'self'" if is_live else "'none'"
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {server}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "STYLE": (STATIC / "style.css").read_text(encoding="utf-8"),
        "DATA": embedded({**data, "live": is_live}),
        "SCRIPT": script,
    }
    template = (STATIC / "page.html").read_text(encoding="utf-8")
    # In one pass: a mark that stands in a run's text stays what it is.
    return re.sub(r"@@([A-Z]+)@@", lambda mark: parts[mark[1]], template)


def embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in, nor open another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
