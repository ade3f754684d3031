"""This file is the wafer in force: the one entered by `with`, or the one whose kernel is traced.

Kept in jax's own user context, so that every jit, scan and checkpoint trace is keyed on it; under a
plain global, a function jitted for one grid would silently be reused on another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_context = jax.make_user_context(None)
_differentiated = jax.make_user_context(False)
_entered = threading.local()


@dataclasses.dataclass(frozen=True)
class _Inside:
    wafer: Wafer


def current() -> Wafer | None:
    """The wafer entered by the innermost `with`; None outside all of them and inside a kernel."""
    value = _context.value
    return None if isinstance(value, _Inside) else value


def resolve(wafer: Wafer | None) -> Wafer | None:
    """The wafer an operation shall use: the one given or else the current one; None means none.

    A wafer of one PE is None too: there the plain operation is the program.
    """
    wafer = current() if wafer is None else wafer
    if wafer is not None and not hasattr(wafer, "backend"):
        raise ValueError(
            f"wafer={wafer!r} is a {type(wafer).__name__}, not a Wafer; adopt a mesh with "
            "wsekern.Wafer.of"
        )
    return None if wafer is None or wafer.size == 1 else wafer


def inside() -> Wafer | None:
    """The wafer whose kernel is being traced; None outside every kernel."""
    value = _context.value
    return value.wafer if isinstance(value, _Inside) else None


def within(wafer: Wafer) -> contextlib.AbstractContextManager:
    """The context in which a kernel of `wafer` is traced."""
    return _context(_Inside(wafer))


def is_differentiating() -> bool:
    """Whether what is traced is differentiated inside the kernel, per PE."""
    return bool(_differentiated.value)


def differentiating() -> contextlib.AbstractContextManager:
    """The context in which a kernel calls `jax.vjp` on moves of its own."""
    return _differentiated(True)


def enter(wafer: Wafer) -> None:
    """Makes `wafer` the current one in this thread, until the matching `leave`."""
    entry = _context(wafer)
    entry.__enter__()
    _stack().append(entry)


def leave() -> None:
    """Ends the innermost `enter` of this thread."""
    _stack().pop().__exit__(None, None, None)


def _stack() -> list:
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    return _entered.stack
