"""JSON schemas for grammars: bounded, and without what a grammar would get wrong."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_BYTES = 65_536
MOST_NESTING = 64  # objects and lists within one another; a schema of objects takes two a level
_MOST_BRANCHES = 100  # of a oneOf
_MOST_REFERENCES = 32  # from one to the next
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems", "contains")
# At most one space, or one line end with its indentation: a model cannot go on with white space
# for ever. What oneOf asks beyond anyOf is checked here.
_OPTIONS = {
    "whitespace_pattern": "( |\\n[ \\t]{0,32})?",
    "lenient": False,
    "coerce_one_of": True,
}


def json_rule(schema: Any, field: str) -> str:
    """A JSON schema as Lark takes it, `%json {..}`.

    Args:
      schema: an object.
      field: where the request has it, for error messages.

    Raises:
      ValueError: it is no object, too long or too deep; or a value may match two schemas of a
        oneOf, which a grammar cannot keep from happening.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{field} must be an object, a JSON schema")
    if "x-guidance" in schema:
        raise ValueError(f"{field} has x-guidance, which is no keyword of JSON schemas")
    if (nesting := _nesting(schema)) > MOST_NESTING:
        raise ValueError(
            f"{field} has {nesting} objects and lists within one another; {MOST_NESTING} is the "
            "most"
        )
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} is no JSON: {error}") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"{field} has {len(text):,} bytes; {MOST_BYTES:,} is the most")
    for part in _parts(schema):
        branches = part.get("oneOf")
        if isinstance(branches, list) and not _are_apart(branches, schema):
            raise ValueError(
                f"{field}: a value may match two schemas of a oneOf; use anyOf, or give each a "
                "required property with another const"
            )
    return f"%json {json.dumps({**schema, 'x-guidance': _OPTIONS})}"


def _nesting(value: Any) -> int:
    """How many objects and lists contain one another at most; counts on to just over the limit."""
    level, layer = 0, [value]
    while layer and level <= MOST_NESTING:
        level += any(isinstance(one, dict | list) for one in layer)
        items = [list(one.values()) if isinstance(one, dict) else one for one in layer]
        layer = [inner for one in items if isinstance(one, list) for inner in one]
    return level


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas within it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in _MAPS:
            if isinstance(part.get(name), dict):
                waiting += part[name].values()
        for name in _LISTS:
            if isinstance(part.get(name), list):
                waiting += part[name]
        waiting += [part[name] for name in _SINGLE if name in part]


def _are_apart(branches: Sequence[Any], root: Mapping[str, Any]) -> bool:
    """Whether no value can match two of the schemas, as far as types and constants tell."""
    if len(branches) > _MOST_BRANCHES:
        return False
    found = [_resolve(branch, root) for branch in branches]
    return all(_differ(one, other) for i, one in enumerate(found) for other in found[i + 1 :])


def _resolve(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that a reference within the same document names; an empty one if it is lost."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = root
        for name in reference.removeprefix("#").strip("/").split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, dict) else None
    return {}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether no value matches both."""
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return values.isdisjoint(others)
    kinds, other_kinds = _kinds(one), _kinds(other)
    if kinds and other_kinds and kinds.isdisjoint(other_kinds):
        return True
    if kinds != {"object"} or other_kinds != {"object"}:
        return False
    return any(
        _values(properties[0]) is not None
        and _values(properties[1]) is not None
        and _differ(*properties)
        for properties in _shared_properties(one, other)
    )


def _shared_properties(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The schemas of each property that both objects must have."""
    for name in one.get("required") or ():
        if name not in (other.get("required") or ()):
            continue
        found = [(schema.get("properties") or {}).get(name) for schema in (one, other)]
        if isinstance(found[0], dict) and isinstance(found[1], dict):
            yield found[0], found[1]


def _values(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """The values of a const or an enum, as JSON; None if there is neither."""
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(choices, list):
        return None
    return frozenset(json.dumps(choice, sort_keys=True) for choice in choices)


def _kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list):
        return frozenset()
    # Every integer is a number.
    return frozenset("number" if kind == "integer" else str(kind) for kind in kinds)
