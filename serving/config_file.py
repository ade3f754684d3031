"""Read a TOML file of settings, each of a known name and type; imports no jax."""

import difflib
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

_SHOWN = 60  # characters of a value in a message
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text in quotes",
    pathlib.Path: "a path in quotes",
}


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """What a TOML file says; a name may be written with hyphens, and comes with underscores.

    Raises:
      ValueError: it is not TOML.
      OSError: it cannot be read.
    """
    try:
        return tomllib.loads(file.read_bytes().decode())
    except RecursionError:
        raise ValueError(f"{file}: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file}: it is not TOML: {error}") from None


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a table by name, each of the type that its name has.

    Args:
      values: from the file; a name may have hyphens for underscores.
      hints: the types of the known names, which have underscores.
      where: the file, and the table in it, for messages.

    Raises:
      ValueError: a name is unknown or comes twice, or a value is of another type.
    """
    checked: dict[str, Any] = {}
    for written, value in values.items():
        name = written.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            mend = f"did you mean {near[0]}?" if near else f"known are {', '.join(hints)}"
            raise ValueError(f"{where}: {written} = {_shown(value)}: no such key; {mend}")
        if name in checked:
            raise ValueError(f"{where}: {name} is there twice, also as {written}; keep one")
        try:
            checked[name] = _convert(value, hints[name])
        except TypeError:
            raise ValueError(
                f"{where}: {written} = {_shown(value)}: write {_kind(hints[name])}"
            ) from None
    return checked


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type of `hint`; TypeError: it is of another."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise TypeError
        return value
    if origin in (types.UnionType, typing.Union):  # one type, or None, which TOML cannot write
        return _convert(value, next(one for one in arguments if one is not type(None)))
    if origin in (tuple, frozenset):
        items = value if isinstance(value, list) else [value]
        return origin(_convert(item, arguments[0]) for item in items)
    if hint is float and type(value) is int:
        return float(value)
    wanted = str if hint is pathlib.Path else hint
    if type(value) is not wanted:  # in Python a bool is an int
        raise TypeError
    return hint(value)


def _kind(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in arguments)
    if origin in (types.UnionType, typing.Union):
        return _kind(next(one for one in arguments if one is not type(None)))
    if origin in (tuple, frozenset):
        return f"{_kind(arguments[0])}, or a list of them"
    return _KINDS[hint]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
