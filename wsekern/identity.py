"""This file is which kernels are one and the same program, so that none is compiled twice.

A partial or a lambda made afresh at each call is another object, but the same program if its code
and all that it holds are the same.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable
from typing import Any


def key(kernel: Callable) -> Hashable | None:
    """Equal for kernels that are the same program; None where that cannot be told."""
    try:
        return _key(kernel, ())
    except _NoKey:
        return None


def frozen(kernel: Callable) -> Callable:
    """`kernel` with what it holds now, whatever its names are bound to later."""
    if isinstance(kernel, functools.partial):
        return functools.partial(frozen(kernel.func), *kernel.args, **kernel.keywords)
    if not isinstance(kernel, types.FunctionType) or not kernel.__closure__:
        return kernel
    cells = tuple(types.CellType(_frozen_value(cell)) for cell in kernel.__closure__)
    copy = types.FunctionType(
        kernel.__code__, kernel.__globals__, kernel.__name__, kernel.__defaults__, cells
    )
    copy.__kwdefaults__ = kernel.__kwdefaults__
    return functools.update_wrapper(copy, kernel)


class _NoKey(Exception):
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another if it holds the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(value: Any, above: tuple[Any, ...]) -> Hashable:
    if any(value is one for one in above):
        raise _NoKey  # a function that holds itself
    above = (*above, value)
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return (*(_key(p, above) for p in parts), tuple(value.keywords), len(value.args))
    if isinstance(value, types.FunctionType):
        held = [_held(cell) for cell in value.__closure__ or ()]
        held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        keys = tuple(_key(h, above) for h in held)
        # The very code object, not an equal one: of a module loaded anew it may use other globals.
        return _Same(value.__code__), keys, _key_of_globals(value, above)
    if isinstance(value, tuple):
        return type(value), tuple(_key(item, above) for item in value)
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 == -0.0, yet they are different programs
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = tuple(_key(getattr(value, f.name), above) for f in dataclasses.fields(value))
        return type(value), _hashable(value) and fields
    return type(value), _hashable(value)  # 1 == 1.0 == True, likewise


def _key_of_globals(function: types.FunctionType, above: tuple[Any, ...]) -> Hashable:
    # In a script or a notebook, a name may be defined anew while the code that uses it stays.
    names = function.__globals__
    if names.get("__name__") != "__main__":
        return ()
    used = [name for name in _names_in(function.__code__) if name in names]
    return tuple(_key_or_object(names[name], above) for name in used)


def _key_or_object(value: Any, above: tuple[Any, ...]) -> Hashable:
    try:
        return _key(value, above)
    except _NoKey:
        return _Same(value)


def _names_in(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names_in(c))]


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise _NoKey from None  # a name that is bound later


def _frozen_value(cell: types.CellType) -> Any:
    value = cell.cell_contents
    return frozen(value) if isinstance(value, types.FunctionType | functools.partial) else value


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise _NoKey from None
    return value
