"""What every benchmark writes beside its figures."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from vpae.files import write_json
from vpae.runs import environment

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if dirty else "")


def write_result(name: str, document: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``results/NAME.json``: the document, and the date, commit and environment it was measured in."""
    target = folder / f"{name}.json"
    write_json(target, document | {"date": date.today().isoformat(), "commit": commit(), "environment": environment()})
    return target


def parts_before(name: str, about: dict[str, Any], part: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What ``results/NAME.json`` holds under ``part`` from earlier calls on the same terms; else nothing."""
    file = folder / f"{name}.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    return before[part] if before and all(before.get(key) == value for key, value in about.items()) else {}
