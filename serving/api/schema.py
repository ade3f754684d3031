"""Check the fields of a request against tables: closed objects, ranges, and errors by name.

A check takes a value and the name of its field and returns the value to use. It raises `ApiError`
with status 400 that names the field.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from serving.api.errors import refuse, shown

Check = Callable[[Any, str], Any]


def flag(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        refuse(name, f"{name} is {shown(value)}; it must be true or false")
    return value


def number(low: float, high: float) -> Check:
    """A check for a number from `low` to `high`."""

    def check(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(name, f"{name} is {shown(value)}; it must be a number")
        if not low <= value <= high:  # false for NaN too
            refuse(name, f"{name} is {shown(value)}; it must lie between {low:g} and {high:g}")
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    """A check for a whole number from `low` to `high`."""

    def check(value: Any, name: str) -> int:
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)  # JSON has one kind of number: 5.0 is 5
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(name, f"{name} is {shown(value)}; it must be a whole number")
        if not low <= value <= high:
            refuse(name, f"{name} is {shown(value)}; it must lie between {low:,} and {high:,}")
        return value

    return check


def text(most: int, *, least: int = 0, pattern: str | None = None) -> Check:
    """A check for a text of `least` to `most` characters, which matches `pattern` whole."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str):
            refuse(name, f"{name} is {shown(value)}; it must be a text")
        if not least <= len(value) <= most:
            refuse(
                name, f"{name} has {len(value):,} characters; it must have {least:,} to {most:,}"
            )
        if pattern is not None and not re.fullmatch(pattern, value):
            refuse(name, f"{name} is {shown(value)}; it must match {pattern}")
        return value

    return check


def one_of(*choices: str) -> Check:
    """A check for one of some texts."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in choices:
            names = ", ".join(choices)
            refuse(name, f"{name} is {shown(value)}; it must be one of {names}")
        return value

    return check


def several(item: Check, least: int, most: int) -> Check:
    """A check for a list of `least` to `most` values."""

    def check(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            refuse(name, f"{name} is {shown(value)}; it must be a list")
        if not least <= len(value) <= most:
            refuse(name, f"{name} has {len(value):,} items; it must have {least:,} to {most:,}")
        return [item(one, f"{name}[{place}]") for place, one in enumerate(value)]

    return check


def record(fields: Mapping[str, Check], required: tuple[str, ...] = ()) -> Check:
    """A check for an object that has no fields but these; a field that is null is left out."""

    def check(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            where = name or "the body"
            refuse(name, f"{where} is {shown(value)}; it must be an object")
        begin = f"{name}." if name else ""
        for field in value:
            if field not in fields:
                where = f"{begin}{field}"
                refuse(where, f"unknown field {shown(where)}; leave it out", "unknown_field")
        for field in required:
            if value.get(field) is None:
                where = f"{begin}{field}"
                refuse(where, f"{where} is missing; it is required", "missing_field")
        return {
            field: fields[field](one, f"{begin}{field}")
            for field, one in value.items()
            if one is not None
        }

    return check


def by_field(key: str, kinds: Mapping[str, Check]) -> Check:
    """A check for an object whose field `key` says which of `kinds` it is."""
    choice = one_of(*kinds)

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            refuse(name, f"{name} is {shown(value)}; it must be an object")
        if value.get(key) is None:
            refuse(f"{name}.{key}", f"{name}.{key} is missing; it is required", "missing_field")
        return kinds[choice(value[key], f"{name}.{key}")](value, name)

    return check


def either(is_text: Check, otherwise: Check) -> Check:
    """A check for a text, or else for something else."""
    return lambda value, name: (is_text if isinstance(value, str) else otherwise)(value, name)


def nothing(value: Any, name: str) -> None:
    """Refuses every value: the field is known, and not supported."""
    refuse(name, f"{name} is not supported; leave it out", "unsupported_field")


def constant(choice: str) -> Check:
    """A check for one text."""
    return one_of(choice)


def anything(value: Any, name: str) -> Any:
    """Takes every value."""
    del name
    return value
