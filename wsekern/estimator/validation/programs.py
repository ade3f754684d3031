"""The program behind each published point, traced at the sizes at which it ran.

A point is a row of a table with the columns of `points.csv`, in that file's notation.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wsekern.estimator.cost import DEFAULT, Constants
from wsekern.estimator.schedule import Schedule
from wsekern.estimator.trace import trace_program
from wsekern.estimator.validation import gemm, prefill, waferllm, wave25
from wsekern.fabric.flood import cost as flood_cost
from wsekern.hardware import MACHINES, Machine
from wsekern.wafer.launch import parse_height_width
from wsekern.wafer.wafer import Wafer


class ModelSizes(NamedTuple):
    """The sizes that a decoder's layers cost by; all programs here have one head."""

    layers: int
    d_model: int
    d_ff: int


MODELS = {
    "LLaMA3-8B": ModelSizes(32, 4096, 14336),
    "LLaMA2-13B": ModelSizes(40, 5120, 13824),
    "CodeLLaMA-34B": ModelSizes(48, 8192, 22016),
    "QWen2-72B": ModelSizes(80, 8192, 29568),
    "Llama-3.3-70B": ModelSizes(80, 8192, 28672),
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """One published figure; its fields are the columns of the table."""

    id: str
    machine: str
    workload: str  # what ran, in the words by which programs are known here
    grid: str  # HEIGHTxWIDTH
    parameters: str  # sizes, as "batch 1; context 4096"
    quantity: str
    value: float
    unit: str
    clock_ghz: float
    source: str

    @property
    def family(self) -> str:
        """The kind of program: "decode", "prefill", "product", "stencil" ...; "" if not known."""
        model = _LLM.match(self.workload)
        if model:
            return model["phase"]
        return next((name for text, name in _FAMILIES.items() if text in self.workload), "")


class ProgramPart(NamedTuple):
    """A trace, and what it does not say of the program."""

    jaxpr: Any
    wafer: Wafer
    vectors_along_rows: bool = False  # of its tile products; see `cost.equation_work`

    def cycles(self, constants: Constants) -> float:
        """The model's cycles of the part."""
        assert self.wafer.machine is not None
        clock_hz = self.wafer.machine.clock_hz
        walk = Schedule(self.wafer, constants, clock_hz, vectors_along_rows=self.vectors_along_rows)
        walk.run(self.jaxpr)
        return walk.cycles


@dataclasses.dataclass(frozen=True)
class PublishedProgram:
    """The traces behind a point, and how the point's figure follows from their cycles."""

    parts: tuple[ProgramPart, ...]
    quantity: Callable[..., float]  # of the cycles of each part

    def predict(self, constants: Constants = DEFAULT) -> float:
        """The model's prediction of the point, in the point's unit."""
        return self.quantity(*(part.cycles(constants) for part in self.parts))


_LLM = re.compile(r"(?P<model>\S+) (?P<phase>decode|prefill|end to end)\b", re.IGNORECASE)
_FAMILIES = {"25-point": "stencil", "GEMM fp32": "product", "broadcast of": "broadcast"}


def program_of(point: PublishedPoint) -> PublishedProgram:
    """The program of a point.

    Raises:
      ValueError: no program here is the point's workload, or a size is missing.
    """
    machine = _machine(point.machine)
    model = _LLM.match(point.workload)
    if model:
        return _model_program(point, machine, model["model"], model["phase"].lower())
    makers = {"stencil": _wave, "product": _product, "broadcast": _broadcast}
    if point.family not in makers:
        raise ValueError(f"workload {point.workload!r} is none of those written here")
    return makers[point.family](point, machine)


def _model_program(
    point: PublishedPoint, machine: Machine, model: str, phase: str
) -> PublishedProgram:
    named = {name.lower(): sizes for name, sizes in MODELS.items()}
    if model.lower() not in named:
        raise ValueError(f"model {model!r} is not one of {', '.join(MODELS)}")
    sizes, second = named[model.lower()], point.clock_ghz * 1e9  # cycles a second
    if phase == "decode":
        part = _decode(machine, _square(point.grid), sizes, _number(point, "context"))
        batch = _number(point, "batch", 1)
        return PublishedProgram((part,), lambda cycles: batch * second / (cycles * sizes.layers))
    if phase == "prefill":
        tokens = _number(point, "context")
        part = _prefill(machine, _square(point.grid), sizes, tokens)
        return PublishedProgram((part,), lambda cycles: tokens * second / (cycles * sizes.layers))
    read, written = _number(point, "input"), _number(point, "output")
    # On the fastest of the grids whose times are published: large for prefill, small for decoding.
    before = _prefill(machine, 720, sizes, read)
    after = _decode(machine, 420, sizes, read + written // 2)
    return PublishedProgram(
        (before, after),
        lambda first, each: written * second / (sizes.layers * (first + written * each)),
    )


@functools.cache
def _decode(machine: Machine, side: int, sizes: ModelSizes, context: int) -> ProgramPart:
    wafer, dtype = Wafer.abstract(machine, side, side), jnp.float16
    D, F, S = (_round_up(n, side) for n in (sizes.d_model, sizes.d_ff, context))
    operands = (
        jax.ShapeDtypeStruct((1, D), dtype),
        waferllm.shapes(D, F, dtype),
        *[jax.ShapeDtypeStruct((1, S, D), dtype)] * 2,
    )
    run = functools.partial(waferllm.decode_layer, wafer=wafer)
    return _traced(run, operands, wafer)


@functools.cache
def _prefill(machine: Machine, side: int, sizes: ModelSizes, tokens: int) -> ProgramPart:
    wafer, dtype = Wafer.abstract(machine, side, side), jnp.float16
    D, F, S = (_round_up(n, side) for n in (sizes.d_model, sizes.d_ff, tokens))
    operands = jax.ShapeDtypeStruct((S, D), dtype), waferllm.shapes(D, F, dtype)
    run = functools.partial(prefill.layer, wafer=wafer)
    return _traced(run, operands, wafer)._replace(vectors_along_rows=True)


def _traced(run: Callable, operands: tuple[Any, ...], wafer: Wafer) -> ProgramPart:
    return ProgramPart(*trace_program("estimate", run, operands, wafer))


def _wave(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    height, width = parse_height_width(point.grid)
    # The published kernel, written by hand, used a few rows more than a program of the framework
    # can have.
    height, width = min(height, machine.usable_height), min(width, machine.usable_width)
    wafer = Wafer.abstract(machine, height, width)
    steps = int(_text_in(point, r"(\d+) steps"))
    u = jax.ShapeDtypeStruct((height, width, _number(point, "nz")), jnp.float32)
    run = functools.partial(wave25.wave, steps=steps, wafer=wafer)
    part = _traced(run, (u, u, u), wafer)
    return PublishedProgram((part,), functools.partial(_time, point))


def _product(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    height, width = parse_height_width(point.grid)
    wafer = Wafer.abstract(machine, height, width)
    N, K, M = (_number(point, name) for name in ("N", "K", "M"))
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, K), (K, M)))
    part = _traced(functools.partial(gemm.dense, wafer=wafer), (a, b), wafer)
    return PublishedProgram((part,), functools.partial(_time, point))


def _broadcast(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    words = int(_text_in(point, r"broadcast of (\d+) words"))
    cycles = flood_cost(*parse_height_width(point.grid), words).cycles(machine)
    return PublishedProgram((), lambda: _time(point, cycles))


def _time(point: PublishedPoint, cycles: float) -> float:
    if point.unit == "cycles":
        return cycles
    if point.unit not in _SECONDS:
        raise ValueError(f"unit {point.unit!r} is not one of {['cycles', *_SECONDS]}")
    return cycles / (point.clock_ghz * 1e9) / _SECONDS[point.unit]


def _machine(name: str) -> Machine:
    for machine in MACHINES:
        if name.lower() in (machine.name.lower(), machine.system.lower()):
            return machine
    raise ValueError(f"machine {name!r} is not one of {[m.name for m in MACHINES]}")


def _square(text: str) -> int:
    height, width = parse_height_width(text)
    if height != width:
        raise ValueError(f"grid {text!r} is not square, as this program needs it")
    return height


def _number(point: PublishedPoint, name: str, default: int | None = None) -> int:
    match = re.search(rf"\b{name}[ =](\d+)", point.parameters)
    if match:
        return int(match[1])
    if default is None:
        raise ValueError(f"parameters {point.parameters!r} have no {name}")
    return default


def _text_in(point: PublishedPoint, pattern: str) -> str:
    match = re.search(pattern, f"{point.workload}; {point.parameters}")
    if not match:
        raise ValueError(f"parameters {point.parameters!r} have nothing like {pattern!r}")
    return match[1]


def _round_up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
