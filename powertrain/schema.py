"""Build frozen dataclasses from plain mappings (YAML, Hydra), with one clear sentence for every mistake."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one sentence for the user."""


class UnknownOptionError(ConfigError):
    """A key that its section does not have.

    Args:
        key: dotted, of the whole configuration.
        section: dotted keys that there are beside it.
    """

    def __init__(self, key: str, section: Iterable[str]) -> None:
        super().__init__(f"unknown option '{key}': {nearest(key, section)}")
        self.key = key


def closest(word: str, known: Iterable[str]) -> list[str]:
    """Return the known words that `word` was most likely to be, sorted; none where none is close.

    Dotted keys are compared by their last words, wherever they are: those with the same one, or else the most similar,
    in the section of `word` sooner than elsewhere.
    """
    section, _, leaf = word.rpartition(".")
    parts = {k: k.rpartition(".") for k in known}
    if same := sorted(k for k, (_, _, last) in parts.items() if last == leaf):
        return same
    scores = {
        k: _similarity(leaf, last) + (0.05 if theirs == section else 0.0) for k, (theirs, _, last) in parts.items()
    }
    return sorted(k for k, score in scores.items() if score == max(scores.values()) >= 0.75)


def _similarity(word: str, known: str) -> float:
    """Return how similar two words are, at most 1: as much as the same if one is a part of the other, like `batch` of
    `micro_batch_size`.
    """
    part_of = set(word.split("_")) <= set(known.split("_"))
    return max(difflib.SequenceMatcher(None, word, known).ratio(), float(part_of))


def nearest(word: str, known: Iterable[str], *, list_all: bool = False) -> str:
    """Return a hint that names the known words closest to `word`, or what is allowed when none is close.

    Args:
        word: what was given.
        known: what is allowed.
        list_all: name all of them after a close one too; for short lists.
    Returns:
        `did you mean 'x'?`, `did you mean 'a.x' or 'b.x'?` or `allowed: a, b, c`, of dotted keys those of the section
        of `word` if there is such a section.
    """
    known = sorted(known)
    close = closest(word, known)
    section = word.rpartition(".")[0]
    allowed = "allowed: " + ", ".join([k for k in known if section and k.startswith(f"{section}.")] or known)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?" + (f" {allowed}" if list_all else "")
    return allowed


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    # Python evaluates the annotations anew each time, and records of sweeps are built by the thousand.
    return get_type_hints(cls)


def leaf_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of a dataclass tree with its type."""
    keys: dict[str, Any] = {}
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        nested = _dataclass_in(kind)
        if nested is None:
            keys[prefix + field.name] = kind
        else:
            keys.update(leaf_keys(nested, f"{prefix}{field.name}."))
    return keys


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Construct dataclass `cls` from `values`, checking keys and types all the way down.

    Args:
        cls: a dataclass; fields may be dataclasses, `Literal`s, unions with None, and lists, tuples or dicts of these.
        values: plain mapping; integral floats (`1e9`) are accepted for int fields.
        where: dotted path of `values` in the whole configuration, for messages.
    Returns:
        An instance of `cls`.
    Errors:
        UnknownOptionError: a key that there is not; it names the nearest of its section.
        ConfigError: wrong type, or what `cls.__post_init__` rejects.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__} must be a mapping of options, got {values!r}")
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise UnknownOptionError(f"{prefix}{key}", [prefix + f for f in fields])
    missing = [
        prefix + name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing option {', '.join(missing)}")
    arguments = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        # The dataclasses of the packages name the whole key themselves.
        raise ConfigError(str(error)) from error


def _dataclass_in(kind: Any) -> type | None:
    if dataclasses.is_dataclass(kind):
        return kind if isinstance(kind, type) else type(kind)
    for option in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ():
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "null"
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(k) for k in get_args(kind))
    if origin is tuple and ... not in get_args(kind):
        return f"[{', '.join(_describe(k) for k in get_args(kind))}]"
    if origin in (list, tuple):
        return f"a list of {_describe(get_args(kind)[0])}" if get_args(kind) else "a list"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
    return names.get(origin or kind, getattr(kind, "__name__", str(kind)))


class _Mismatch(Exception):
    pass


def _convert(kind: Any, value: Any, where: str) -> Any:
    try:
        return _try_convert(kind, value, where)
    except _Mismatch:
        raise ConfigError(f"{where}={value!r} is not allowed: it must be {_describe(kind)}") from None


def _try_convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else build(kind, value, where)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _try_convert(option, value, where)
            except _Mismatch:
                continue
        raise _Mismatch
    if kind is type(None):
        if value is None:
            return None
    elif origin is Literal:
        # YAML reads `none`-like words as text but numbers as numbers: compare both.
        for allowed in args:
            if type(value) is type(allowed) and value == allowed:
                return allowed
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            return int(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind is str:
        # Run ids, names and dates often look like numbers to YAML.
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
    elif origin in (list, tuple):
        if isinstance(value, str) and args[:1] == (str,):
            return origin([value])  # `data.files=corpus/*.txt` is a list of one
        if isinstance(value, list | tuple):
            if origin is tuple and args and args[-1] is not Ellipsis:
                if len(value) != len(args):
                    raise _Mismatch
                return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
            element = args[0] if args else Any
            if element in (int, float) and all(type(v) is element for v in value):
                return origin(value)  # the long columns of records
            return origin(_convert(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is dict or kind is dict:
        if isinstance(value, Mapping):
            element = args[1] if args else Any
            return {str(k): _convert(element, v, f"{where}.{k}") for k, v in value.items()}
    else:
        return value
    raise _Mismatch
