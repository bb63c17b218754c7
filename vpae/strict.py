"""Dataclasses from plain YAML values, strictly: every key present, none unknown, every type right."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
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
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{'.' if prefix else ''}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {_join(prefix, key)!r}; {hint}")
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
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, key)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where, key)
    wrong = UserError(f"{where}: key {key!r} must be {_describe(hint)}, not {value!r} ({kind_of(value)})")
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.4)
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
        return value
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text
            value = float(value)
        except ValueError:
            raise wrong from None
    ok = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }[hint]
    if not ok:
        raise wrong
    return float(value) if hint is float else value
