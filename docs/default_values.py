"""Show the value of a named default in the reference: `1e-05`, where the source has `TOLERANCE`."""

import ast
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import griffe

LONGEST = 24  # characters; a longer value stays a name


class DefaultValues(griffe.Extension):
    """Replaces the names of constants in signatures by what they are."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        for function in _functions(pkg):
            for parameter in function.parameters:
                if isinstance(parameter.default, griffe.ExprName):
                    value = _value(parameter.default.canonical_path, loader)
                    if value and len(value) <= LONGEST:
                        parameter.default = value


def _functions(thing: griffe.Object) -> Iterator[griffe.Function]:
    for member in thing.members.values():
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from _functions(member)


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
