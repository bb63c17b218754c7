"""What became of each clip of a source: used as it is, adjusted (and how), or left out (and why)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SHOWN = 12  # lines of a summary for each kind


@dataclass(frozen=True)
class Outcome:
    """One clip's fate.

    Attributes:
        note: what was done to make it fit, empty where nothing was.
        left_out: why it is not in the cache, empty where it is.
    """

    name: str
    caption: str
    note: str = ""
    left_out: str = ""

    def plain(self) -> dict[str, str]:
        """For a shard's header."""
        kept = {"name": self.name, "caption": self.caption, "note": self.note}
        return {"name": self.name, "left_out": self.left_out} if self.left_out else kept

    @classmethod
    def from_plain(cls, plain: dict[str, str]) -> Outcome:
        return cls(plain["name"], plain.get("caption", ""), plain.get("note", ""), plain.get("left_out", ""))

    @property
    def kind(self) -> str:
        return "left out" if self.left_out else "adjusted" if self.note else "as it is"

    def reported(self) -> dict[str, str]:
        """For a line of the report."""
        how = {"why": self.left_out} if self.left_out else {"how": self.note} if self.note else {}
        return {"clip": self.name, "outcome": self.kind, **how}


def parsed(text: str) -> list[dict[str, str]]:
    """The plain outcomes in a shard's header.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        outcomes = json.loads(text)
    except (TypeError, RecursionError):
        raise ValueError("no outcomes of clips") from None
    known = {"name", "caption", "note", "left_out"}
    if not isinstance(outcomes, list) or not all(
        isinstance(o, dict) and "name" in o and o.keys() <= known and all(isinstance(v, str) for v in o.values())
        for o in outcomes
    ):
        raise ValueError("no outcomes of clips")
    return outcomes


def tally(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many clips had each fate; every key is there."""
    counts = Counter(o.kind for o in outcomes)
    return {"as_it_is": counts["as it is"], "adjusted": counts["adjusted"], "left_out": counts["left out"]}


def summary(outcomes: Sequence[Outcome], report: Path) -> str:
    """Some lines for people: the numbers, then by name what was adjusted and what was left out."""
    counts = tally(outcomes)
    lines = [
        f"clips: {counts['as_it_is']} as they are, {counts['adjusted']} adjusted, {counts['left_out']} left out; "
        f"each by name in {report}"
    ]
    for kind in ("adjusted", "left out"):
        of_kind = [o for o in outcomes if o.kind == kind]
        for outcome in of_kind[:_SHOWN]:
            lines.append(f"  {kind}: {outcome.name}: {outcome.left_out or outcome.note}")
        if len(of_kind) > _SHOWN:
            lines.append(f"  {kind}: and {len(of_kind) - _SHOWN} more")
    return "\n".join(lines)
