"""The program behind each published point, traced at the sizes at which it ran.

A point is a row of a table with the columns of `points.csv`, in that file's notation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wsekern.estimator import memory
from wsekern.estimator.cost import DEFAULT, Constants
from wsekern.estimator.schedule import Schedule
from wsekern.estimator.trace import trace_program
from wsekern.estimator.validation import gemm, prefill, waferllm, wave25
from wsekern.fabric.flood import cost as flood_cost
from wsekern.hardware import MACHINES, Machine
from wsekern.kernels.matmul.matmul import matmul
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
_REPEATS = 100  # of a product with a vector, as its benchmark times them
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


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
            return model["phase"].lower()
        workload = self.workload.lower()
        return next((name for text, name in _FAMILIES.items() if text in workload), "")

    @property
    def states_grid(self) -> bool:
        """Whether the table says on how many PEs the program ran."""
        return re.fullmatch(r"\d+\s*x\s*\d+", self.grid.strip()) is not None


class ProgramPart(NamedTuple):
    """A trace, and what it does not say of the program."""

    jaxpr: Any
    wafer: Wafer
    vectors_along_rows: bool = False  # of its tile products; see `cost.equation_work`

    @property
    def fits(self) -> bool:
        """Whether a PE has room for the program's data."""
        machine = self.wafer.machine
        assert machine is not None
        room = machine.sram_bytes - machine.code_bytes
        return memory.high_water(self.jaxpr, self.wafer) <= room

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
    note: str = ""  # what the table does not say, and was chosen: "on 720x720, the best grid"

    def predict(self, constants: Constants = DEFAULT) -> float:
        """The model's prediction of the point, in the point's unit."""
        return self.quantity(*(part.cycles(constants) for part in self.parts))


_SIZES = re.compile(r"\b\d+[kK]?(?:\s*x\s*\d+[kK]?)+\b")
_LLM = re.compile(r"(?P<model>\S+) (?P<phase>decode|prefill|end to end)\b", re.IGNORECASE)
# By what stands in a workload's name, in lower case; the first that does.
_FAMILIES = {
    "25-point": "stencil",
    "broadcast of": "broadcast",
    "gemv": "vector product",
    "meshgemm": "mesh product",
    "gemm": "product",
}
_FLOPS = {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15}
_LEAST_SIDE, _SIDE_STEP = 120, 60  # of the grids that are tried where the table has none


def program_of(point: PublishedPoint) -> PublishedProgram:
    """The program of a point.

    Raises:
      ValueError: no program here is the point's workload, or a size is missing.
    """
    machine = _machine(point.machine)
    model = _LLM.match(point.workload)
    if model:
        return _model_program(point, machine, model["model"], model["phase"].lower())
    makers = {
        "stencil": _wave,
        "product": _product,
        "mesh product": _mesh_product,
        "vector product": _vector_product,
        "broadcast": _broadcast,
    }
    if point.family not in makers:
        raise ValueError(
            f"workload {point.workload!r} is none of those written here: MODEL decode, prefill or "
            "end to end; 25-point ...; ... GEMM or GEMV ...; broadcast of N words"
        )
    return makers[point.family](point, machine)


def _model_program(
    point: PublishedPoint, machine: Machine, model: str, phase: str
) -> PublishedProgram:
    named = {name.lower(): sizes for name, sizes in MODELS.items()}
    if model.lower() not in named:
        raise ValueError(f"model {model!r} is not one of {', '.join(MODELS)}")
    sizes, second = named[model.lower()], point.clock_ghz * 1e9  # cycles a second
    if point.unit != "tokens/s":
        raise ValueError(f"unit {point.unit!r} of a model is not 'tokens/s'")
    if phase in ("decode", "prefill"):
        tokens, batch = _number(point, "context"), _number(point, "batch", 1)
        trace_layer = _decode if phase == "decode" else _prefill
        if phase == "prefill" and batch != 1:
            raise ValueError(f"batch {batch}: prefill is written for one sequence")

        def on(side: int) -> ProgramPart:
            return trace_layer(machine, side, sizes, tokens)

        made = batch if phase == "decode" else tokens  # tokens that one run yields
        return _on_a_square(point, machine, on, lambda n: made * second / (n * sizes.layers))
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
    """A float32 product: the baseline that the SpMM benchmarks publish, or the best one here."""
    # In those benchmarks, N x K times K x M.
    M, K, N = _sizes(point, "NKM" if _is_baseline(point) else "MKN")
    dtype = _dtype(point, jnp.float32)
    a, b = (jax.ShapeDtypeStruct(s, dtype) for s in ((M, K), (K, N)))
    run = gemm.dense if _is_baseline(point) else matmul
    flops = 2.0 * M * K * N

    def on(height: int, width: int) -> ProgramPart:
        wafer = Wafer.abstract(machine, height, width)
        return _traced(functools.partial(run, wafer=wafer), (a, b), wafer)

    if point.states_grid:
        part = on(*parse_height_width(point.grid))
        return PublishedProgram((part,), functools.partial(_figure, point, flops))
    return _on_a_square(
        point, machine, lambda side: on(side, side), functools.partial(_figure, point, flops)
    )


def _mesh_product(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    sizes, dtype = _sizes(point, "MKN"), _dtype(point, jnp.float16)

    def on(side: int) -> ProgramPart:
        wafer = Wafer.abstract(machine, side, side)
        M, K, N = (_round_up(n, side) for n in sizes)
        a, b = (jax.ShapeDtypeStruct(s, dtype) for s in ((M, K), (K, N)))
        run = functools.partial(prefill.product, wafer=wafer)
        return _traced(run, (a, b), wafer)._replace(vectors_along_rows=True)

    flops = 2.0 * math.prod(sizes)
    return _on_a_square(point, machine, on, functools.partial(_figure, point, flops))


def _vector_product(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    K, N = _sizes(point, "MN" if "M" in _lettered_sizes(point) else "KN")
    dtype = _dtype(point, jnp.float16)

    def on(side: int) -> ProgramPart:
        wafer = Wafer.abstract(machine, side, side)
        rows, columns = _round_up(K, side), _round_up(N, side)
        x, w = (jax.ShapeDtypeStruct(s, dtype) for s in ((1, rows), (rows, columns)))
        run = functools.partial(waferllm.vector_products, repeats=_REPEATS, wafer=wafer)
        return _traced(run, (x, w), wafer)

    flops = 2.0 * K * N
    return _on_a_square(point, machine, on, lambda n: _figure(point, flops, n / _REPEATS))


def _on_a_square(
    point: PublishedPoint,
    machine: Machine,
    on: Callable[[int], ProgramPart],
    quantity: Callable[[float], float],
) -> PublishedProgram:
    """The program on the point's square grid, or else on the one where it takes fewest cycles."""
    if point.states_grid:
        return PublishedProgram((on(_square(point.grid)),), quantity)
    most = min(machine.usable_height, machine.usable_width)
    parts = {side: on(side) for side in range(_LEAST_SIDE, most + 1, _SIDE_STEP)}
    fitting = {side: part for side, part in parts.items() if part.fits}
    if not fitting:
        raise ValueError("no grid is stated, and on none of this machine does the program fit")
    best = min(fitting, key=lambda side: fitting[side].cycles(DEFAULT))
    return PublishedProgram((fitting[best],), quantity, f"on {best}x{best}, the best grid")


def _is_baseline(point: PublishedPoint) -> bool:
    """Whether a product is the dense one beside which the SpMM benchmarks publish sparse ones."""
    return re.search(r"\b(dense|baseline)\b", point.workload.lower()) is not None


def _sizes(point: PublishedPoint, letters: str) -> list[int]:
    """A product's sizes in the order of `letters`, from the parameters or else from the name.

    Parameters give each by its letter, "M=64 N=768 K=768", or one for all, "n=16384". A name has
    them in order, "4096 x 4096 x 64" or "16K x 16K", or one for all, "8192 x 8192".
    """
    lettered = _lettered_sizes(point)
    if set(letters) <= set(lettered):
        return [lettered[letter] for letter in letters]
    found = _SIZES.search(point.workload) or _SIZES.search(point.parameters)
    if found is None:
        if set(lettered) == {"N"}:
            return [lettered["N"]] * len(letters)
        raise ValueError(
            f"workload {point.workload!r} has no sizes like 4096 x 4096, and parameters "
            f"{point.parameters!r} give none of n=4096 or {' '.join(f'{n}=4096' for n in letters)}"
        )
    sizes = [_size(text) for text in re.split(r"\s*x\s*", found[0])]
    if len(set(sizes)) == 1:
        return sizes[:1] * len(letters)
    if len(sizes) != len(letters):
        raise ValueError(
            f"workload {point.workload!r} has {len(sizes)} sizes, it needs {len(letters)}"
        )
    return sizes


def _lettered_sizes(point: PublishedPoint) -> dict[str, int]:
    """The sizes M, N and K that the parameters give: "M=N=64; k=16K" has all three."""
    sizes: dict[str, int] = {}
    pattern = r"\b((?:[mnk]\s*=\s*|[mnk]\s+)+)(\d+k?)\b"
    for names, size in re.findall(pattern, point.parameters, re.IGNORECASE):
        sizes |= {name.upper(): _size(size) for name in re.findall("[a-zA-Z]", names)}
    return sizes


def _size(text: str) -> int:
    return int(text.rstrip("kK")) * (1024 if text[-1] in "kK" else 1)


def _dtype(point: PublishedPoint, default: Any) -> Any:
    text = f"{point.workload} {point.parameters}".lower()
    if re.search(r"fp16|float16|half|bf16", text):
        return jnp.float16
    return jnp.float32 if re.search(r"fp32|float32|single", text) else default


def _figure(point: PublishedPoint, flops: float, cycles: float) -> float:
    """The time of a product, or its rate."""
    if point.unit in _FLOPS:
        return flops * point.clock_ghz * 1e9 / cycles / _FLOPS[point.unit]
    return _time(point, cycles)


def _broadcast(point: PublishedPoint, machine: Machine) -> PublishedProgram:
    words = int(_text_in(point, r"broadcast of (\d+) words"))
    # A row of PEs, unless the table has another grid.
    grid = point.grid if point.states_grid else "1x" + _text_in(point, r"along (\d+) PEs")
    cycles = flood_cost(*parse_height_width(grid), words).cycles(machine)
    return PublishedProgram((), lambda: _time(point, cycles))


def _time(point: PublishedPoint, cycles: float) -> float:
    if point.unit == "cycles":
        return cycles
    if point.unit not in _SECONDS:
        units = ["cycles", *_SECONDS, *(_FLOPS if "product" in point.family else ())]
        raise ValueError(f"unit {point.unit!r} is not one of {units}")
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
    match = re.search(rf"\b{name}\s*[ =]\s*(\d+k?)\b", point.parameters, re.IGNORECASE)
    if match:
        return _size(match[1])
    if default is None:
        raise ValueError(f"parameters {point.parameters!r} have no {name}")
    return default


def _text_in(point: PublishedPoint, pattern: str) -> str:
    match = re.search(pattern, f"{point.workload}; {point.parameters}", re.IGNORECASE)
    if not match:
        raise ValueError(f"parameters {point.parameters!r} have nothing like {pattern!r}")
    return match[1]


def _round_up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
