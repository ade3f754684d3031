"""This file is the trace of a program, and how its equations are read in jax 0.10 to 0.12."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

_LIBRARY = str(pathlib.Path(__file__).parents[1])
MOVES = frozenset(
    "ppermute psum psum_invariant pmax pmin all_gather all_gather_invariant all_gather_reduced "
    "reduce_scatter psum_scatter all_to_all".split()
)
_OTHERS = ("site-packages", "<frozen", "importlib", "/runpy.py")


def trace_program(
    what: str, function: Callable, operands: Sequence[Any], wafer: Wafer | None
) -> tuple[Any, Wafer]:
    """The jaxpr of `function(*operands)` on an abstract wafer, and that wafer; nothing runs.

    Raises:
      ValueError: there is no wafer.
    """
    wafer = context.current() if wafer is None else wafer
    if wafer is None:
        raise ValueError(f"{what}: there is no wafer; give wafer= or enter one")
    if wafer.backend == "virtual":
        assert wafer.machine is not None
        placement, corner = wafer.placement, wafer.corner  # where its PEs lie
        wafer = Wafer.abstract(wafer.machine, wafer.height, wafer.width, wafer.wafers)
        wafer = dataclasses.replace(wafer, placement=placement, corner=corner)
    with wafer:
        # A new function each time: a trace made before, on another wafer, is not looked up.
        closed = jax.make_jaxpr(lambda *operands: function(*operands))(*operands)
    return closed.jaxpr, wafer


def inner_jaxpr(params: dict[str, Any]) -> Any:
    """The jaxpr that an equation calls, if it calls one."""
    solves = params.get("jaxprs")  # those of a linear solve, of which the solution's own is run
    solve = getattr(solves, "solve", None)
    for value in (params.get("jaxpr"), params.get("call_jaxpr"), params.get("fun_jaxpr"), solve):
        if value is not None:
            return getattr(value, "jaxpr", value)
    return None


def inner_operands(equation: Any, given: Sequence[Any]) -> list[Any]:
    """What an equation hands to the jaxpr that it calls, of what is `given` for its operands."""
    taken = len(inner_jaxpr(equation.params).invars)
    lengths = equation.params.get("const_lengths")
    if lengths is None:
        return list(given[len(given) - taken :])
    # Of a linear solve: what the product, the transposed one, both solutions read; the right side.
    begin = lengths.matvec + lengths.vecmat
    return [*given[begin : begin + lengths.solve], *given[sum(lengths) :]]


class ScanParts(NamedTuple):
    """What a scan is made of: its operands are constants, what is carried, and what is scanned."""

    body: Any
    length: int
    consts: int
    carry: int


def scan_parts(equation: Any) -> ScanParts:
    """The loop of a scan. Its operands are told by shapes, which jax 0.10 and 0.12 share."""
    body = inner_jaxpr(equation.params)
    # What is scanned has one dimension more.
    scanned = sum(_rank(a) > _rank(b) for a, b in zip(equation.invars, body.invars, strict=True))
    carry = sum(_rank(a) == _rank(b) for a, b in zip(equation.outvars, body.outvars, strict=True))
    consts = len(body.invars) - carry - scanned
    return ScanParts(body, equation.params["length"], consts, carry)


def used_equations(jaxpr: Any) -> set[int]:
    """The places of the equations whose results are used, or that have an effect."""
    wanted = {v for v in jaxpr.outvars if not is_literal(v)}
    places = set()
    for place, equation in reversed(list(enumerate(jaxpr.eqns))):
        if wanted.intersection(equation.outvars) or equation.effects:
            places.add(place)
            wanted.update(v for v in equation.invars if not is_literal(v))
    return places


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a number in the program's text."""
    return hasattr(atom, "val")


def line_of(equation: Any) -> str:
    """The line that an equation comes from, "file.py:12": the user's, or else the library's."""
    traceback = equation.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    own = ""
    for frame in frames:
        if not frame.file_name.startswith(_LIBRARY):
            if not any(part in frame.file_name for part in _OTHERS):
                return f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
        elif not own:
            own = f"{pathlib.Path(frame.file_name).name}:{frame.line_num}"
    return own


def _rank(atom: Any) -> int:
    return len(atom.aval.shape)


def static_results(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which results nothing but a PE's place decides, if of the operands these are so."""
    here = dict.fromkeys(jaxpr.constvars, True) | dict(zip(jaxpr.invars, flags, strict=True))

    def of(atom: Any) -> bool:
        return is_literal(atom) or here[atom]

    for equation in jaxpr.eqns:
        given = [of(v) for v in equation.invars]
        inner = inner_jaxpr(equation.params)
        if equation.primitive.name in MOVES or inner is None or equation.primitive.name == "scan":
            outs = [all(given) and equation.primitive.name not in MOVES] * len(equation.outvars)
        else:
            outs = static_results(inner, inner_operands(equation, given))
        here.update(zip(equation.outvars, outs, strict=True))
    return [of(v) for v in jaxpr.outvars]
