"""The trace of a program, and how to read its equations in jax 0.10 to 0.12."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

# Frames below this folder, wsekern/, are the library's; those of models/ and training/ are not.
_LIBRARY = str(pathlib.Path(__file__).parents[1]) + os.sep
_COMMAND = _LIBRARY + "cli.py"
# Frames of neither the library nor the user: installed packages, and what starts a program.
_OTHERS = (
    "site-packages",
    "dist-packages",
    "<frozen",
    os.path.dirname(jax.__file__) + os.sep,
    sysconfig.get_paths()["stdlib"] + os.sep,
)
MOVES = frozenset(
    "ppermute psum psum_invariant pmax pmin all_gather all_gather_invariant all_gather_reduced "
    "reduce_scatter psum_scatter all_to_all".split()
)


def trace_program(
    caller: str, function: Callable, operands: Sequence[Any], wafer: Wafer | None
) -> tuple[Any, Wafer]:
    """The jaxpr of `function(*operands)` on an abstract wafer, and that wafer; nothing runs.

    Args:
      caller: the public function that errors name.
      function: what to trace.
      operands: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
      wafer: the wafer to trace on, a virtual one as the abstract one of its size; None: the one in
        force.

    Raises:
      ValueError: there is no wafer.
    """
    wafer = context.current() if wafer is None else wafer
    if wafer is None:
        raise ValueError(f"{caller}: there is no wafer; give wafer= or enter one")
    if wafer.backend == "virtual":
        assert wafer.machine is not None
        placement, corner = wafer.placement, wafer.corner  # where its PEs lie
        wafer = Wafer.abstract(wafer.machine, wafer.height, wafer.width, wafer.wafers)
        wafer = dataclasses.replace(wafer, placement=placement, corner=corner)
    with wafer:
        # JAX caches traces by function, and one made before may be of another wafer. A new lambda
        # is never found in that cache.
        closed = jax.make_jaxpr(lambda *operands: function(*operands))(*operands)
    return closed.jaxpr, wafer


def inner_jaxpr(params: dict[str, Any]) -> Any:
    """The jaxpr that an equation calls; None if it calls none."""
    # A linear solve has four: its product, the transposed one, and both solutions. Only the
    # solution runs.
    if "dimensions" in params or "window_dimensions" in params:
        return None  # of a reduction: it says how to join two elements, and is no call
    if "grid_mapping" in params:
        return None  # of a Pallas kernel: its operands are references to memory
    solves = params.get("jaxprs")
    solve = getattr(solves, "solve", None)
    for value in (params.get("jaxpr"), params.get("call_jaxpr"), params.get("fun_jaxpr"), solve):
        if value is not None:
            return getattr(value, "jaxpr", value)
    return None


def inner_operands(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Which of `operands`, one for each of the equation's, go to the jaxpr that it calls."""
    count = len(inner_jaxpr(equation.params).invars)
    lengths = equation.params.get("const_lengths")
    if lengths is None:
        return list(operands[len(operands) - count :])
    # The operands of a linear solve are the constants of its four functions and the right side:
    #   matvec constants | vecmat constants | solve constants | transposed constants | b
    # and its solution takes solve constants | b.
    begin = lengths.matvec + lengths.vecmat
    return [*operands[begin : begin + lengths.solve], *operands[sum(lengths) :]]


class ScanParts(NamedTuple):
    """A scan's body, and how its operands divide: constants, then the carry, then what it scans."""

    body: Any
    length: int  # trips
    consts: int  # operands that are the same in each trip
    carry: int  # operands that a trip hands to the next


def scan_parts(equation: JaxprEqn) -> ScanParts:
    """The parts of a scan.

    The ranks of operands tell them apart, because the names of a scan's parameters differ between
    jax 0.10 and 0.12. A scan over x [8, 4] of a body that takes c [3] and x [4] has

      operands [3], [8, 4]   body [3], [4]    so that x, which loses a dimension, is scanned
      results  [3], [8, 4]   body [3], [4]    so that c, which keeps its rank, is carried
    """
    invars: Sequence[Any] = equation.invars
    body = inner_jaxpr(equation.params)
    scanned = sum(_rank(a) > _rank(b) for a, b in zip(invars, body.invars, strict=True))
    carry = sum(_rank(a) == _rank(b) for a, b in zip(equation.outvars, body.outvars, strict=True))
    consts = len(body.invars) - carry - scanned
    return ScanParts(body, equation.params["length"], consts, carry)


def used_equations(jaxpr: Jaxpr) -> set[int]:
    """The places of the equations whose results are used, or that have an effect."""
    wanted: set[Any] = {v for v in jaxpr.outvars if not is_literal(v)}
    places = set()
    for place, equation in reversed(list(enumerate(jaxpr.eqns))):
        if wanted.intersection(equation.outvars) or equation.effects:
            places.add(place)
            wanted.update(v for v in equation.invars if not is_literal(v))
    return places


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a number in the program's text."""
    return hasattr(atom, "val")


class SourceLine(NamedTuple):
    """Where in the source an equation was asked for, as "file.py:12"; "" where nobody is known."""

    user: str  # the innermost line that belongs neither to wsekern nor to an installed package
    library: str  # the innermost line of wsekern
    direct: bool  # whether the user's code asked for the operation itself, not the library for it

    def within(self, call: str, by_library: bool) -> str:
        """The line to name for an equation inside of a call.

        Args:
          call: the line that was named for the call; "" if there is none.
          by_library: whether the library made the call. JAX may have kept its trace from an earlier
            call, on another line of the user's.
        """
        if self.direct:
            return self.user
        return (call if by_library else "") or self.user or call or self.library


def line_of(equation: JaxprEqn) -> SourceLine:
    """Where in the source an equation was asked for."""
    stack = equation.source_info.traceback
    frames: list[Any] = [] if stack is None else stack.frames
    return line_of_frames((frame.file_name, frame.line_num) for frame in frames)


def line_of_frames(frames: Iterable[tuple[str, int]]) -> SourceLine:
    """Where in the source a stack of calls comes from.

    Args:
      frames: file names with line numbers, innermost first.
    """
    library = ""
    for name, number in frames:
        if name.startswith(_LIBRARY):
            library = library or _line(name, number)
        elif _is_of_user(name):
            return SourceLine(_line(name, number), library, direct=not library)
    return SourceLine("", library, direct=False)


def asked_by(equation: JaxprEqn, folder: str) -> bool:
    """Whether the library's code in `folder`, such as "/kernels/matmul/", asked for an equation."""
    stack = equation.source_info.traceback
    frames: list[Any] = [] if stack is None else stack.frames
    return any(f.file_name.startswith(_LIBRARY) and folder in f.file_name for f in frames)


def line_of_caller() -> str:
    """The source line from which the library was called; "" if its own command did.

    What is traced names no frame outside of the traced function: `estimate(wk.matmul, a, b)` has
    only frames of the library.
    """
    for frame, number in traceback.walk_stack(sys._getframe()):
        name = frame.f_code.co_filename
        if name.startswith(_COMMAND):
            break
        if not name.startswith(_LIBRARY) and _is_of_user(name):
            return _line(name, number)
    return ""


def _line(file_name: str, number: int) -> str:
    return f"{os.path.basename(file_name)}:{number}"


@functools.cache
def _is_of_user(file_name: str) -> bool:
    return not any(part in file_name for part in _OTHERS)


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def static_results(jaxpr: Jaxpr, static: Sequence[bool]) -> list[bool]:
    """Which results are decided by PEs' places and loop counters alone.

    Args:
      jaxpr: of a kernel.
      static: whether each operand is so decided.
    """
    states: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, True)
    states |= dict(zip(jaxpr.invars, static, strict=True))

    def is_static(atom: Any) -> bool:
        return is_literal(atom) or states[atom]

    for equation in jaxpr.eqns:
        ins = [is_static(v) for v in equation.invars]
        inner = inner_jaxpr(equation.params)
        # What a move brings is another PE's, so that this PE's place does not decide it. A scan is
        # static as a whole or not at all; its carry is looked at when the scan itself is walked.
        if equation.primitive.name in MOVES or inner is None or equation.primitive.name == "scan":
            outs = [all(ins) and equation.primitive.name not in MOVES] * len(equation.outvars)
        else:
            outs = static_results(inner, inner_operands(equation, ins))
        states.update(zip(equation.outvars, outs, strict=True))
    return [is_static(v) for v in jaxpr.outvars]
