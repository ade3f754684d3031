"""Bound the JSON schemas that clients send, before a grammar is made of them."""

from collections.abc import Iterator
from typing import Any

from serving.api.errors import refuse, shown

_DEEPEST = 32
_MOST_PARTS = 5000  # objects and lists of a schema
_MOST_NAMES = 1000  # properties, and values of enums


def check_schema(value: Any, name: str) -> dict[str, Any]:
    """Checks that a schema is an object, neither deep nor large.

    Args:
      value: as the client sent it.
      name: of the field, for errors.

    Raises:
      ApiError: 400.
    """
    if not isinstance(value, dict):
        refuse(name, f"{name} is {shown(value)}; it must be an object, a JSON schema")
    parts, names = 0, 0
    for part, depth in _parts(value):
        if depth > _DEEPEST:
            refuse(name, f"{name} is nested more than {_DEEPEST} deep", "schema_too_deep")
        parts += 1
        properties, choices = part.get("properties"), part.get("enum")
        names += len(properties) if isinstance(properties, dict) else 0
        names += len(choices) if isinstance(choices, list) else 0
        if parts > _MOST_PARTS or names > _MOST_NAMES:
            refuse(
                name,
                f"{name} is too large: {_MOST_PARTS:,} parts, and {_MOST_NAMES:,} properties and "
                "values of enums are the most",
                "schema_too_large",
            )
    return value


def check_strict(value: dict[str, Any], name: str) -> None:
    """Checks that every object of a schema refuses properties that it does not name.

    Raises:
      ApiError: 400.
    """
    for part, _ in _parts(value):
        kinds = part.get("type")
        is_object = kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
        is_object = is_object or isinstance(part.get("properties"), dict)
        if is_object and part.get("additionalProperties") is not False:
            refuse(
                name,
                f"{name} is strict, and an object of it lacks `additionalProperties: false`; "
                "add it to every object, or leave out strict",
                "wrong_schema",
            )


_SCHEMAS = (
    *("items", "contains", "additionalProperties", "propertyNames", "additionalItems", "not"),
    *("if", "then", "else", "unevaluatedProperties", "unevaluatedItems"),
)
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def _parts(root: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """The schema and those within it, each with its depth."""
    waiting = [(root, 1)]
    while waiting:
        schema, depth = waiting.pop()
        yield schema, depth
        below: list[Any] = [schema.get(key) for key in _SCHEMAS]
        for key in _LISTS:
            if isinstance(schema.get(key), list):
                below += schema[key]
        for key in _MAPS:
            if isinstance(schema.get(key), dict):
                below += schema[key].values()
        waiting += [(one, depth + 1) for one in below if isinstance(one, dict)]
