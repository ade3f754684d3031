"""The wafer in force: the one entered by `with`, or the one whose kernel is being traced.

It is kept in jax's own user context, on which every trace of a jit, scan or checkpoint is keyed. If
it were a plain global, a function jitted for one grid would silently be reused on another.
"""

import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING

import jax

from wsekern.wafer.absent import check_only_traced

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_context = jax.make_user_context(None)
_differentiating = jax.make_user_context(False)
_entered = threading.local()


@dataclasses.dataclass(frozen=True)
class _InsideKernel:
    wafer: "Wafer"


def current() -> "Wafer | None":
    """The wafer entered by the innermost `with`; None outside of any, and inside a kernel."""
    value = _context.value
    return None if isinstance(value, _InsideKernel) else value


def resolve(wafer: "Wafer | None", *, computes: bool = True) -> "Wafer | None":
    """The wafer that an operation uses: `wafer`, else the current one; None for neither.

    None for a wafer of one PE too: the plain operation is the program there.

    Args:
      wafer: what the operation was given.
      computes: whether the operation computes, so that its chips must be there or it be traced.

    Raises:
      ValueError: it is not a Wafer, or its chips are not there and nothing is traced.
    """
    wafer = current() if wafer is None else wafer
    if wafer is not None and not hasattr(wafer, "backend"):
        raise ValueError(
            f"wafer={wafer!r} is a {type(wafer).__name__}, not a Wafer; adopt a mesh with "
            "wsekern.Wafer.of"
        )
    if wafer is not None and computes:
        check_only_traced(wafer)
    return None if wafer is None or wafer.size == 1 else wafer


def inside() -> "Wafer | None":
    """The wafer whose kernel is being traced; None outside every kernel."""
    value = _context.value
    return value.wafer if isinstance(value, _InsideKernel) else None


def within(wafer: "Wafer") -> contextlib.AbstractContextManager:
    """The context in which a kernel of `wafer` is traced."""
    return _context(_InsideKernel(wafer))


def is_differentiating() -> bool:
    """Whether the kernel being traced is differentiating its own moves by `jax.vjp`."""
    return bool(_differentiating.value)


def differentiating() -> contextlib.AbstractContextManager:
    """The context in which a kernel calls `jax.vjp` on its own moves."""
    return _differentiating(True)


def enter(wafer: "Wafer") -> None:
    """Makes `wafer` the current one in this thread, until the matching `leave`."""
    entry = _context(wafer)
    entry.__enter__()
    _stack().append(entry)


def leave() -> None:
    """Ends the innermost `enter` of this thread."""
    _stack().pop().__exit__(None, None, None)


def _stack() -> list[contextlib.AbstractContextManager]:
    # A wafer is a value that several threads may enter, so that it cannot keep this itself.
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    return _entered.stack
