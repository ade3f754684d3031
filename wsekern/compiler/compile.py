"""Compile a program for chips that are not there, and read what the compiler made: `wk.compile`."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from wsekern.compiler import hlo, schedule
from wsekern.compiler.dump import arrays_at_peak, dump_folder, scheduled_text
from wsekern.compiler.mesh_axes import MeshAxes
from wsekern.compiler.pallas_calls import flops_by_kernel
from wsekern.compiler.result import Compilation, MemoryUse
from wsekern.estimator.estimate import estimate
from wsekern.estimator.memory import LiveArray, live_at_peak
from wsekern.estimator.trace import line_of_frames
from wsekern.hardware import WSE3, Accelerator, accelerator
from wsekern.wafer import context, layout
from wsekern.wafer.specs import axes_of
from wsekern.wafer.topology import kept_out_of_cache
from wsekern.wafer.wafer import Wafer

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile(  # noqa: A001  the field's word for it
    function: Callable[..., Any],
    *shapes: Any,
    wafer: Wafer | None = None,
    donate_argnums: tuple[int, ...] = (),
    out_shardings: Any = None,
    name: str = "",
    roofline: bool = True,
) -> Compilation:
    """The program that a chip's own compiler makes of `function(*shapes)`; nothing is run.

    `print` the result for a table: whether it fits a chip's memory, what it sends and what of that
    it waits for, the kernels of the vendor and of Pallas that it calls, its time by a model, and
    the longest operations by the user's line. The chips need not be there: see `Wafer.topology`.

    Args:
      function: any function that JAX can trace; a jitted one keeps its own options.
      shapes: its operands as `jax.ShapeDtypeStruct`s or arrays, or pytrees of them. One without a
        `sharding` is laid out as the operations of this library take it: the last two dimensions
        over y and x, the first of more over the wafers, each where it divides.
      wafer: of the chips to compile for; by default the current wafer.
      donate_argnums: operands whose memory the results may reuse, as in `jax.jit`.
      out_shardings: of the results, as in `jax.jit`; None: as the compiler sees fit.
      name: what the report calls the program; by default the function's name.
      roofline: whether to count the program's operations in its trace too, for a roofline.

    Raises:
      ValueError: there is no wafer, or it is not of TPUs or GPUs whose figures are known.
    """
    wafer = context.current() if wafer is None else wafer
    chip = _check_wafer(wafer)
    assert wafer is not None
    shapes = jax.tree.map(lambda leaf: _laid_out(leaf, wafer), shapes)
    jitted: Any = function
    if not hasattr(function, "lower"):
        options = {} if out_shardings is None else {"out_shardings": out_shardings}
        jitted = jax.jit(function, donate_argnums=donate_argnums, **options)
    with wafer:
        began = time.perf_counter()
        traced = jitted.trace(*shapes)
        lowered = traced.lower()
        trace_seconds = time.perf_counter() - began
        began = time.perf_counter()
        executable, refusal, text = None, "", ""
        largest: tuple[LiveArray, ...] = ()
        with dump_folder(wafer) as (folder, options):
            try:
                with kept_out_of_cache() if wafer.compile_only else contextlib.nullcontext():
                    executable = lowered.compile(compiler_options=options or None)
                text = scheduled_text(folder)
            except jax.errors.JaxRuntimeError as error:
                if _OUT_OF_MEMORY not in str(error):
                    raise
                refusal, largest = str(error), arrays_at_peak(folder, _user_line)
    compile_seconds = time.perf_counter() - began
    cost, why_no_schedule = None, refusal and "it does not fit, and so there is no program"
    is_estimate = executable is None and not largest
    if is_estimate:
        largest = live_at_peak(traced.jaxpr.jaxpr, wafer, _argument_bytes(shapes))
    if executable is not None:
        cost, why_no_schedule = _price(executable, text, traced, wafer, chip)
    return Compilation(
        name=name or getattr(function, "__name__", type(function).__name__),
        wafer=wafer,
        chip=chip,
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        memory=_memory_of(executable, refusal),
        argument_bytes=sum(_argument_bytes(shapes)),
        largest_arrays=largest,
        arrays_estimated=is_estimate,
        cost=cost,
        why_no_schedule=why_no_schedule,
        roofline_seconds=_roofline(function, shapes, wafer, chip) if roofline else None,
        executable=executable,
    )


def _check_wafer(wafer: Wafer | None) -> Accelerator:
    if wafer is None:
        raise ValueError(
            'compile: there is no wafer; give wafer=wk.Wafer.topology("v5e:4x4"), or enter one'
        )
    chip = accelerator(wafer.device_kind or "") if wafer.backend == "devices" else None
    if chip is None:
        known = 'wk.Wafer.topology("v5e:4x4"), "v6e:16x16", "v5p:4x4x4" or "h100:2x4"'
        raise ValueError(
            f"compile: {wafer!r} is not of TPUs or GPUs whose figures are known; give wafer={known}"
        )
    return chip


def _laid_out(leaf: Any, wafer: Wafer) -> jax.ShapeDtypeStruct:
    """The leaf's shape with its own sharding, or the one that an operation would take."""
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(getattr(sharding, "mesh", None), Mesh)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    shape = np.shape(leaf)
    if not on_mesh and (sharding is None or isinstance(leaf, jax.Array)):
        spec = layout.tiled(len(shape)) if len(shape) > 1 else P(*[None] * len(shape))
        sharding = wafer.sharding(_dividing(spec, shape, wafer))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _dividing(spec: P, shape: tuple[int, ...], wafer: Wafer) -> P:
    """`spec` without the axes that do not divide their dimension."""

    def divides(entry: Any, size: int) -> bool:
        count = 1
        for axis in axes_of(entry):
            count *= wafer.axis_size(axis)
        return size % count == 0

    return P(*(e if divides(e, size) else None for e, size in zip(spec, shape, strict=True)))


def _argument_bytes(shapes: Any) -> list[int]:
    """Bytes of a chip's part of each operand."""

    def bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
        tile = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(tile) * leaf.dtype.itemsize

    return [bytes_of(leaf) for leaf in jax.tree.leaves(shapes)]


def _memory_of(executable: jax.stages.Compiled | None, refusal: str) -> MemoryUse:
    if executable is None:
        found = re.search(r"([^.:]*)\((\d+(?:\.\d+)?)([KMGT]?)\) exceeds", refusal)
        size = float(found[2]) * _UNITS[found[3]] if found else None
        return MemoryUse(refused_bytes=size, refusal=" ".join(refusal.split()))
    stats: Any = executable.memory_analysis()
    return MemoryUse(
        arguments=stats.argument_size_in_bytes,
        results=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def _price(
    executable: jax.stages.Compiled, text: str, traced: Any, wafer: Wafer, chip: Accelerator
) -> tuple[schedule.Cost | None, str]:
    """The cost by the schedule, or why there is none."""
    try:
        program = hlo.parse(text or executable.as_text() or "")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return None, f"the text of the schedule cannot be had: {' '.join(str(error).split())}"
    flops = flops_by_kernel(traced.jaxpr.jaxpr)
    return schedule.price(program, _mesh_axes(wafer), chip, _user_line, flops), ""


def _user_line(frames: tuple[hlo.Frame, ...]) -> str:
    source = line_of_frames((frame.file, frame.number) for frame in frames)
    return source.user or source.library


def _mesh_axes(wafer: Wafer) -> MeshAxes:
    names = {mesh_name: axis for axis, mesh_name in wafer.names}
    links, mesh = wafer.links or {}, wafer.device_mesh
    axes = tuple(str(names.get(name, name)) for name in mesh.axis_names)
    rings = tuple(
        axis in links and links[axis].ends == 1 and mesh.shape[name] > 2
        for axis, name in zip(axes, mesh.axis_names, strict=True)
    )
    return MeshAxes(axes, tuple(mesh.shape[name] for name in mesh.axis_names), rings)


def _roofline(
    function: Callable[..., Any], shapes: Any, wafer: Wafer, chip: Accelerator
) -> float | None:
    """Seconds of all chips at their peaks, by the trace of the program; None if it has no count."""
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    abstract = Wafer.abstract(WSE3, wafer.height, wafer.width, wafer.wafers)
    try:
        whole = estimate(function, *plain, wafer=abstract)
    except Exception:  # a program that names its own mesh, or loops for a number of times unknown
        return None
    return whole.accelerators[chip.name] / wafer.size
