"""Says how many cases were carried out."""

from __future__ import annotations

from fuzzing import CASES


def pytest_terminal_summary(terminalreporter) -> None:
    if CASES:
        terminalreporter.write_line(f"fuzzing: {sum(CASES.values())} cases in {len(CASES)} tests")
