"""Make signatures in the reference shorter and say more.

A named default shows its value: `1e-05`, where the source has `TOLERANCE`. An annotation shows the
type alone: `str`, where the source has `Annotated[str, arg(metavar="DIR")]` for the command line.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import griffe

LONGEST = 24  # characters; a longer value stays a name


class Signatures(griffe.Extension):
    """Rewrites defaults and annotations once a package is read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        for thing in _members(pkg):
            if isinstance(thing, griffe.Attribute):
                thing.annotation = _type(thing.annotation)
                continue
            for parameter in thing.parameters:
                parameter.annotation = _type(parameter.annotation)
                if isinstance(parameter.default, griffe.ExprName):
                    value = _value(parameter.default.canonical_path, loader)
                    if value and len(value) <= LONGEST:
                        parameter.default = value


def _members(thing: griffe.Object) -> Iterator[griffe.Function | griffe.Attribute]:
    for member in thing.members.values():
        if isinstance(member, griffe.Function | griffe.Attribute):
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from _members(member)


def _type(annotation: str | griffe.Expr | None) -> str | griffe.Expr | None:
    if (
        isinstance(annotation, griffe.ExprSubscript)
        and annotation.canonical_name == "Annotated"
        and isinstance(annotation.slice, griffe.ExprTuple)
    ):
        return annotation.slice.elements[0]
    return annotation


def _value(path: str, loader: griffe.GriffeLoader) -> str | None:
    module, _, name = path.rpartition(".")
    try:
        file = loader.modules_collection[module].filepath
    except KeyError:  # a builtin, or another package's
        return None
    return _constants(file).get(name)


@functools.cache
def _constants(file: pathlib.Path) -> dict[str, str]:
    """The top-level assignments of a file. griffe itself knows none of `A, B = 1, 2`."""
    values = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs = [(target, node.value)]
                values |= {ast.unparse(name): ast.unparse(value) for name, value in pairs}
    return values
