"""Dataclasses from plain YAML values, strictly: every key present, none unknown, every type right."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

import yaml

from vpae.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML without three traps of version 1.1: a key ``on`` is text, a date is text, and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(text: str) -> Any:
    """Plain values from YAML text.

    Raises:
        yaml.YAMLError: it is not valid.
        ValueError: it is, but holds a number that cannot be.
    """
    return yaml.load(text, _Loader)


def shown(value: Any) -> str:
    """A value as errors show it: on one line, not too long, and also where it has more digits than Python prints."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a value that is too large to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def kind_of(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "empty"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def build(cls: type, plain: Any, where: str, prefix: str) -> Any:
    """A dataclass from a mapping, all keys present, none unknown, all types right."""
    section = f"section {prefix!r}" if prefix else "the recipe"
    if not isinstance(plain, dict):
        raise UserError(f"{where}: {section} must be a mapping of keys, not {kind_of(plain)}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in plain:
        if key not in names:
            key = key if isinstance(key, str) else shown(key)
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{'.' if prefix else ''}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {shown(_join(prefix, key))}; {hint}")
    for name in names:
        if name not in plain:
            raise UserError(f"{where}: missing key {_join(prefix, name)!r} ({_describe(hints[name])})")
    values = {name: _convert(hints[name], plain[name], where, _join(prefix, name)) for name in names}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {section}: {error}") from None


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if a is type(None) else _describe(a) for a in args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _chosen(classes: list[type], value: Any, where: str, key: str) -> type:
    """Which of several dataclasses a section is meant to be: the one whose ``kind`` it names."""
    known = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in classes}
    named = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(named, str) or named not in known:
        near = difflib.get_close_matches(str(named), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        what = f"not {named!r}{hint}" if isinstance(value, dict) else f"and section {key!r} is {kind_of(value)}"
        raise UserError(f"{where}: key {_join(key, 'kind')!r} must be one of {', '.join(known)}, {what}")
    return known[named]


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _convert(_chosen(kinds, value, where, key) if len(kinds) > 1 else kinds[0], value, where, key)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, key)
    wrong = UserError(f"{where}: key {key!r} must be {_describe(hint)}, not {shown(value)} ({kind_of(value)})")
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(shown(value).strip("'"), [str(a) for a in args], n=1, cutoff=0.4)
            raise UserError(f"{wrong}; did you mean {near[0]}?" if near else str(wrong))
        return value
    if origin is tuple:
        fixed = len(args) if args[-1] is not Ellipsis else None
        if not isinstance(value, list) or (fixed is not None and len(value) != fixed):
            raise wrong
        kinds = args if fixed is not None else [args[0]] * len(value)
        return tuple(_convert(k, v, where, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        if fault := _fault(value):
            raise UserError(f"{where}: section {key!r} holds {fault}")
        return value
    if hint is float and isinstance(value, str | int):
        try:  # YAML 1.1 reads 1e-4 as text
            value = value if isinstance(value, bool) else float(value)
        except (ValueError, OverflowError):
            raise wrong from None
    ok = {
        int: isinstance(value, int) and not isinstance(value, bool) and -_LARGEST <= value < _LARGEST,
        float: isinstance(value, float) and abs(value) < float("inf"),
        bool: isinstance(value, bool),
        str: isinstance(value, str) and _is_text(value),
    }[hint]
    if not ok:
        raise wrong
    return float(value) if hint is float else value


def _is_text(value: str) -> bool:
    try:  # YAML's escapes can make halves of letters
        value.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False


def _fault(value: Any) -> str:
    """Why a section of free content is none that can be written down again as it is; empty where it can."""
    seen, todo = 0, [(value, 0)]
    while todo:
        item, depth = todo.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST:  # a YAML alias may stand for what it is in
            return "too many values, or values in one another"
        if isinstance(item, dict):
            if odd := [k for k in item if not isinstance(k, str)]:
                return f"the key {shown(odd[0])}, which is no text"
            todo += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            todo += [(part, depth + 1) for part in item]
        elif isinstance(item, str):
            if not _is_text(item):
                return f"{shown(item)}, which is not valid Unicode"
        elif isinstance(item, int):
            if not -_LARGEST <= item < _LARGEST:
                return "a whole number of more than 64 bits"
        elif isinstance(item, float):
            if not abs(item) < float("inf"):
                return f"{item}, which is no finite number"
        elif item is not None:
            return f"{shown(item)}, a {kind_of(item)}; write numbers, text, lists and mappings"
    return ""


_LARGEST, _DEEPEST, _MOST = 1 << 63, 20, 10_000

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda v: v > 0, "above 0"),
    "betas": (lambda v: all(0 <= b < 1 for b in v), "two numbers from 0 to below 1"),
    "eps": (lambda v: v > 0, "above 0"),
    "weight_decay": (lambda v: v >= 0, "at least 0"),
    "warmup_steps": (lambda v: v >= 0, "at least 0"),
    "clip_norm": (lambda v: v is None or v > 0, "above 0, or null"),
    "rank": (lambda v: v >= 1, "at least 1"),
    "alpha": (lambda v: v > 0, "above 0"),
    "ema_decay": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "student_steps": (lambda v: v >= 1, "at least 1 (set the phase to null to skip it)"),
    "text_dropout": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "guidance_scale": (lambda v: v >= 0, "at least 0"),
    "teacher_guidance": (lambda v: v >= 0, "at least 0"),
    "weight": (lambda v: v >= 0, "at least 0"),
    "spatial_sigma": (lambda v: v >= 0, "at least 0"),
    "temporal_sigma": (lambda v: v >= 0, "at least 0"),
    "first_frame_weight": (lambda v: v > 0, "above 0"),
    "head_warmup_turns": (lambda v: v >= 0, "at least 0"),
    "student_gan_weight": (lambda v: v >= 0, "at least 0"),
    "critic_gan_weight": (lambda v: v >= 0, "at least 0"),
    "r1_weight": (lambda v: v >= 0, "at least 0"),
    "r1_sigma": (lambda v: v > 0, "above 0"),
    "grid_shift": (lambda v: v > 0, "above 0"),
    "huber_c": (lambda v: v > 0, "above 0"),
} | dict.fromkeys(
    "steps fake_per_student head_per_student critic_per_student grid_steps count frames batch clips teacher_steps "
    "width num_heads queries global_batch micro_batch sequence_parallel log_every sample_every samples "
    "checkpoint_every keep_checkpoints patience every".split(),
    (lambda v: v >= 1, "at least 1"),
)


def check_ranges(value: Any, where: str, prefix: str) -> None:
    """Refuse a number outside the range that its key's name stands for, at any depth of a built recipe.

    Raises:
        UserError: naming the key, the range and the value.
    """
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            check_ranges(item, where, f"{prefix}[{i}]")
    if not dataclasses.is_dataclass(value):
        return
    for field in dataclasses.fields(value):
        item, key = getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name
        if field.name in _RANGES and not _RANGES[field.name][0](item):
            raise UserError(f"{where}: key {key!r} must be {_RANGES[field.name][1]}, not {item}")
        check_ranges(item, where, key)
