"""Property-based fuzzing: a number of cases fast and many slow, each under guard."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpae.errors import UserError

CASES: Counter[str] = Counter()  # carried out, by test
_SECONDS = 60  # that one case may take on a busy machine before it is called a hang
_REACHES_OUT = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
# of an audit event: which of its arguments are paths that change, and which are the folders' handles they are in
_CHANGES = {
    "os.mkdir": {0: 2},
    "os.remove": {0: 1},
    "os.rmdir": {0: 1},
    "os.rename": {0: 2, 1: 3},
    "os.symlink": {1: 2},
    "os.link": {1: 3},
    "os.truncate": {0: None},
    "os.chmod": {0: 2},
}
_watched: list[tuple[Path, list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    inside, found = _watched[-1]
    if event in _REACHES_OUT:
        found.append(f"{event} {arguments[:2]}")
    elif event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or flags & (os.O_WRONLY | os.O_RDWR)
        if writes and not isinstance(path, int):
            _check_inside(event, path, inside, found)
    elif event in _CHANGES:
        for which, handle in _CHANGES[event].items():
            path, place = arguments[which], -1 if handle is None else arguments[handle]
            if not isinstance(path, int):
                _check_inside(
                    event, path if place == -1 else f"/proc/self/fd/{place}/{os.fsdecode(path)}", inside, found
                )


def _check_inside(event: str, path: Any, inside: Path, found: list[str]) -> None:
    text = os.fsdecode(path)
    if event in ("open", "os.chmod", "os.truncate"):
        text = os.path.realpath(text)
    else:  # these are about a name in a folder, wherever it leads
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
    if not text.startswith(f"{inside}{os.sep}") and text not in (str(inside), os.devnull) and "__pycache__" not in text:
        found.append(f"{event} {text!r}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(inside: Path) -> Iterator[None]:
    """Nothing is unpickled, started or fetched in here, nothing written outside of ``inside``, and it ends in time."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"a hang: not done in {_SECONDS} s")

    before, found = signal.signal(signal.SIGALRM, late), []
    signal.alarm(_SECONDS)
    _watched.append((inside.resolve(), found))
    try:
        yield
    finally:
        _watched.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not found, found


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the UserError that it raises, whose message is one line; all else goes through."""
    try:
        return action()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), f"not one line: {str(error)!r}"
        return error


def cases(fast: int, slow: int) -> pytest.MarkDecorator:
    """Parametrise a test by its number of cases."""
    return pytest.mark.parametrize("count", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def explore(count: int, inside: Path, strategy: st.SearchStrategy) -> Callable[[Callable], None]:
    """Call what is decorated with ``count`` drawn cases, under guard. Few are the same each time, many are not."""

    def run(check: Callable) -> None:
        name = os.environ.get("PYTEST_CURRENT_TEST", check.__qualname__).split(" ")[0]

        def counted(value: Any) -> None:
            CASES[name] += 1
            with guarded(inside):
                check(value)

        counted.__name__ = counted.__qualname__ = re.sub(r"\W", "_", name)
        chosen = settings(
            max_examples=count, deadline=None, database=None, derandomize=count < 500, suppress_health_check=HealthCheck
        )
        chosen(given(strategy)(counted))()

    return run


# values that YAML and JSON can give, the awkward ones often
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400, True, False]),
    st.integers(-100, 100),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 0.5, 1.0, 1 - 1e-9]),
    st.floats(),
)
WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "null", "~", "1e-4", "nan", "..", "../x", "/etc/passwd", "a\nb", "\0", "\ud800", "x" * 5000]
    ),
    st.text(max_size=30),
    st.text(st.characters(codec="utf-8"), max_size=30),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=8
)


def places(plain: Any, prefix: tuple = ()) -> list[tuple]:
    """The path of every value in a plain structure."""
    items = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    return [found for key, value in items for found in ((*prefix, key), *places(value, (*prefix, key)))]


def _copy(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _copy(value) for key, value in plain.items()}
    return [_copy(value) for value in plain] if isinstance(plain, list) else plain


@st.composite
def mutated(draw: st.DrawFn, plain: Any, values: st.SearchStrategy = VALUES) -> Any:
    """A plain structure with one to three of its values replaced, removed, doubled, moved or joined by another."""
    plain = _copy(plain)
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        known = places(plain)
        if not known:
            return plain
        *parents, last = draw(st.sampled_from(known))
        node = plain
        for key in parents:
            node = node[key]
        change = draw(st.sampled_from(("replace", "kin", "kin", "near", "remove", "add", "swap")))
        if change == "remove":
            del node[last]
        elif change == "add" and isinstance(node, dict):
            node[draw(WORDS | st.integers())] = draw(values)
        elif change == "add":
            node.insert(last, draw(values))
        elif change == "swap":
            *others, other = draw(st.sampled_from(known))
            source = plain
            with contextlib.suppress(KeyError, IndexError, TypeError):
                for key in others:
                    source = source[key]
                node[last] = _copy(source[other])
        elif change == "near" and isinstance(node[last], int | float) and not isinstance(node[last], bool):
            node[last] = draw(st.sampled_from([node[last] + 1, node[last] - 1, -node[last], node[last] * 2]))
        elif change == "kin" and isinstance(node[last], int | float | str):
            node[last] = draw(WORDS if isinstance(node[last], str) else NUMBERS)
        else:
            node[last] = draw(values)
    return plain


@st.composite
def damaged(draw: st.DrawFn, data: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Bytes that were cut, of which bits flipped, or parts were lost, doubled, overwritten or put in."""
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        length = draw(st.integers(1, 40))
        change = draw(st.sampled_from(("flip", "flip", "cut", "lose", "double", "put", "over")))
        piece = draw(st.sampled_from(tokens)) if tokens and draw(st.booleans()) else draw(st.binary(max_size=8))
        data = {
            "flip": lambda at=at, d=data: d[:at] + bytes([d[at] ^ 1 << draw(st.integers(0, 7))]) + d[at + 1 :],
            "cut": lambda at=at, d=data: d[:at],
            "lose": lambda at=at, d=data, n=length: d[:at] + d[at + n :],
            "double": lambda at=at, d=data, n=length: d[: at + n] + d[at:],
            "put": lambda at=at, d=data, p=piece: d[:at] + p + d[at:],
            "over": lambda at=at, d=data, p=piece: d[:at] + p + d[at + len(p) :],
        }[change]()
    return data
