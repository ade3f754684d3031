"""This file is which program a published point is of, and at what sizes it ran.

A point is a row of a table with the columns of `points.csv`, whose notation it uses.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wsekern.estimator.cost import DEFAULT, Constants
from wsekern.estimator.schedule import Schedule
from wsekern.estimator.trace import trace_program
from wsekern.estimator.validation import gemm, waferllm, wave25
from wsekern.fabric.flood import cost as flood_cost
from wsekern.hardware import MACHINES, Machine
from wsekern.wafer.launch import parse_height_width
from wsekern.wafer.wafer import Wafer

# Layers, width and width between, of the models as published; one head in all of these programs.
MODELS = {
    "LLaMA3-8B": (32, 4096, 14336),
    "LLaMA2-13B": (40, 5120, 13824),
    "CodeLLaMA-34B": (48, 8192, 22016),
    "QWen2-72B": (80, 8192, 29568),
    "Llama-3.3-70B": (80, 8192, 28672),
}
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """One published figure."""

    id: str
    machine: str
    workload: str
    grid: str
    parameters: str
    quantity: str
    value: float
    unit: str
    clock_ghz: float
    source: str

    @property
    def family(self) -> str:
        """The kind of program, of which several points are."""
        model = _LLM.match(self.workload)
        if model:
            return model["what"]
        return next((name for text, name in _FAMILIES.items() if text in self.workload), "")


@dataclasses.dataclass(frozen=True)
class PublishedProgram:
    """What a point's figure follows from: traces, and what their cycles make of it."""

    parts: tuple[tuple[Any, Wafer], ...]
    quantity: Callable[..., float]

    def predicted(self, constants: Constants = DEFAULT) -> float:
        """The point's quantity, in its unit."""
        return self.quantity(*(_cycles(jaxpr, wafer, constants) for jaxpr, wafer in self.parts))


_LLM = re.compile(r"(?P<model>\S+) (?P<what>decode|prefill|end to end)\b", re.IGNORECASE)
_FAMILIES = {"25-point": "stencil", "GEMM fp32": "product", "broadcast of": "broadcast"}


def program_of(point: PublishedPoint) -> PublishedProgram:
    """The program of a point.

    Raises:
      ValueError: it is of none that stands here, or a size is missing; says which.
    """
    machine = _machine(point.machine)
    model = _LLM.match(point.workload)
    if model:
        return _of_model(point, machine, model["model"], model["what"].lower())
    makers = {"stencil": _wave, "product": _product, "broadcast": _broadcast}
    if point.family not in makers:
        raise ValueError(f"workload {point.workload!r} is none of those written here")
    return makers[point.family](point, machine)


def _of_model(point: PublishedPoint, machine: Machine, model: str, what: str) -> PublishedProgram:
    named = {name.lower(): sizes for name, sizes in MODELS.items()}
    if model.lower() not in named:
        raise ValueError(f"model {model!r} is not one of {', '.join(MODELS)}")
    sizes, second = named[model.lower()], point.clock_ghz * 1e9
    if what == "decode":
        part = _decode(machine, _square(point.grid), sizes, _number(point, "context"))
        batch = _number(point, "batch", 1)
        return PublishedProgram((part,), lambda cycles: batch * second / (cycles * sizes[0]))
    if what == "prefill":
        tokens = _number(point, "context")
        part = _prefill(machine, _square(point.grid), sizes, tokens)
        return PublishedProgram((part,), lambda cycles: tokens * second / (cycles * sizes[0]))
    read, written = _number(point, "input"), _number(point, "output")
    # On the best of the grids whose times are published: small for decoding, large for prefill.
    before = _prefill(machine, 720, sizes, read)
    after = _decode(machine, 420, sizes, read + written // 2)
    return PublishedProgram(
        (before, after),
        lambda first, each: written * second / (sizes[0] * (first + written * each)),
    )


@functools.cache
def _decode(machine: Machine, side: int, sizes: tuple[int, int, int], context: int) -> Any:
    wafer, dtype = Wafer.abstract(machine, side, side), jnp.float16
    D, F, S = (_up(n, side) for n in (*sizes[1:], context))
    operands = (
        jax.ShapeDtypeStruct((1, D), dtype),
        waferllm.shapes(D, F, dtype),
        *[jax.ShapeDtypeStruct((1, S, D), dtype)] * 2,
    )
    run = functools.partial(waferllm.decode_layer, wafer=wafer)
    return trace_program("estimate", run, operands, wafer)


@functools.cache
def _prefill(machine: Machine, side: int, sizes: tuple[int, int, int], tokens: int) -> Any:
    wafer, dtype = Wafer.abstract(machine, side, side), jnp.float16
    D, F, S = (_up(n, side) for n in (*sizes[1:], tokens))
    operands = jax.ShapeDtypeStruct((S, D), dtype), waferllm.shapes(D, F, dtype)
    run = functools.partial(waferllm.prefill_layer, wafer=wafer)
    return trace_program("estimate", run, operands, wafer)


def _wave(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    height, width = parse_height_width(point.grid)
    # The hand kernel had a few rows more than a program of the framework can have.
    height, width = min(height, machine.usable_height), min(width, machine.usable_width)
    wafer = Wafer.abstract(machine, height, width)
    steps = int(_found(point, r"(\d+) steps"))
    u = jax.ShapeDtypeStruct((height, width, _number(point, "nz")), jnp.float32)
    run = functools.partial(wave25.wave, steps=steps, wafer=wafer)
    part = trace_program("estimate", run, (u, u, u), wafer)
    return PublishedProgram((part,), functools.partial(_time, point))


def _product(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    height, width = parse_height_width(point.grid)
    wafer = Wafer.abstract(machine, height, width)
    N, K, M = (_number(point, name) for name in ("N", "K", "M"))
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, K), (K, M)))
    part = trace_program("estimate", functools.partial(gemm.dense, wafer=wafer), (a, b), wafer)
    return PublishedProgram((part,), functools.partial(_time, point))


def _broadcast(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    words = int(_found(point, r"broadcast of (\d+) words"))
    cycles = flood_cost(*parse_height_width(point.grid), words).cycles(machine)
    return PublishedProgram((), lambda: _time(point, cycles))


def _time(point: PublishedPoint, cycles: float) -> float:
    if point.unit == "cycles":
        return cycles
    if point.unit not in _UNITS:
        raise ValueError(f"unit {point.unit!r} is not one of {['cycles', *_UNITS]}")
    return cycles / (point.clock_ghz * 1e9) / _UNITS[point.unit]


def _cycles(jaxpr: Any, wafer: Wafer, constants: Constants) -> float:
    assert wafer.machine is not None
    walk = Schedule(wafer, constants, wafer.machine.clock_hz)
    walk.run(jaxpr)
    return walk.cycles


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
    found = re.search(rf"\b{name}[ =](\d+)", point.parameters)
    if found:
        return int(found[1])
    if default is None:
        raise ValueError(f"parameters {point.parameters!r} have no {name}")
    return default


def _found(point: PublishedPoint, pattern: str) -> str:
    found = re.search(pattern, f"{point.workload}; {point.parameters}")
    if not found:
        raise ValueError(f"parameters {point.parameters!r} have nothing like {pattern!r}")
    return found[1]


def _up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
