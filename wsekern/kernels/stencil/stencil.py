"""Stencils: a user's update of a tile with its halo, taken many steps.

Halos that are exchanged once for several steps are from C. Ding and Y. He, "A Ghost Cell Expansion
Method for Reducing Communications in Solving PDE Problems", 2001.

How a call runs: `stencil` makes a plan (`plan`), `Wafer.map` runs `_per_pe` on every PE, `prepare`
traces the update once (`traced_update`), and `run_steps` takes the steps (`steps`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from wsekern import fabric
from wsekern.kernels.stencil import geometry, halo, nan_check
from wsekern.kernels.stencil.buffers import Fields, Tile, Tiles
from wsekern.kernels.stencil.geometry import Axes, Boundary, Width
from wsekern.kernels.stencil.halo import Along
from wsekern.kernels.stencil.plan import (
    WAFER,
    StencilOptions,
    StencilPlan,
    coefficient_arrays,
    make_plan,
)
from wsekern.kernels.stencil.sources import (
    Emitters,
    Readers,
    Receivers,
    Records,
    Sources,
    make_emitters,
    make_readers,
)
from wsekern.kernels.stencil.steps import prepare, run_steps
from wsekern.kernels.stencil.traced_update import RadiusError
from wsekern.wafer import context, layout
from wsekern.wafer.axes import axes_of
from wsekern.wafer.platforms import traced_platform
from wsekern.wafer.program import local_program
from wsekern.wafer.wafer import Wafer


def stencil(
    u: Fields,
    update: Callable[..., Any],
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: PyTree[ArrayLike] = None,
    corners: bool | None = None,
    sources: Sources | None = None,
    receivers: Receivers | None = None,
    save_every: int | None = None,
    checkpoint: str | None = None,
    depth: int | None = None,
    overlap: bool | None = None,
    check_finite: bool = False,
    donate: bool = False,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Fields:
    """`u` after `steps` steps of `update`, the same field on every mesh.

    `update(u)` makes tiles, of any size, from tiles with `radius` more cells around. It is called
    as `update(u, coefficients)` if there are some, and with `step=`, counted from 0, if it has such
    a parameter. Its Python code runs once for a program, but once for each size of tile if it does
    more than cut, pad, stack and compute cell by cell (a convolution, a loop). A PE sends
    `depth * radius` cells to each neighbor once in `depth` steps, and between computes its
    neighbors' nearest cells itself. It holds two padded copies of its tiles. Differentiable,
    forward and reverse.

    Args:
      u: a field, or a pytree of fields of one shape. On a staggered grid each cell is kept with the
        faces behind it, to the east and the south. The face before the first cell is a ghost cell;
        the one after the last cell stays as it is with the boundary ("zero", "fixed").
      update: one step, as said above.
      radius: cells that `update` takes off: one number for every dimension that it takes some off,
        or a number or a pair (low, high) for each dimension.
      boundary: what lies beyond the field in each step: "periodic", "zero", a number, "edge",
        "reflect", "symmetric", "fixed" (the `radius` cells nearest to the end stay as they are), or
        a function from the `radius` nearest cells to the ghost cells. One for all sides, or one for
        each dimension, or (low, high) for each dimension; or a dict of these by a field's name.
      steps: how many.
      coefficients: a pytree that `update` reads. An array with as many dimensions as the field is
        split as the field is and has the same halo, except along dimensions of size 1. Beyond the
        field its last cells repeat, or it is periodic as the field is. Others are whole everywhere.
      corners: whether `update` reads cells diagonally across; by default as its slices say. A star
        reads none, so less is sent where each step has an exchange. Deeper halos need them.
      sources: what is added to a field at points after each step.
      receivers: where a field is read after each step.
      save_every: steps from one snapshot to the next.
      checkpoint: for a gradient, in reverse mode only, "sqrt" keeps sqrt(steps) states and what
        `update` needs of a few steps, and takes each step three times. None keeps everything.
      depth: steps from one exchange to the next; by default as machine, tile and `radius` suggest.
      overlap: whether a tile's inside is computed apart from its rim, while the halo travels; by
        default not, as the rim then takes longer than what is waited for.
      check_finite: outside jit, whether to find where a result that is not finite began.
      donate: outside jit, whether the result may take the memory of `u`, which is gone then.
      spec: over which axes the dimensions lie; by default as `u` is split, else the first along y
        and over the wafers, the second along x.
      wafer: where to run; by default the current wafer, or else the mesh that `u` is split over.
        Inside jit, grad and vmap, how `u` is split over Auto axes is not known, and it is laid out
        over all of them: the first dimension over all axes but the last, the second over that.

    Returns:
      `u`; with `save_every` also snapshots `[steps // save_every, ...]`; with `receivers` also,
      last, what they read, `[steps, points]`.

    Raises:
      ValueError: `update` does not take `radius` cells off or changes dtype, a halo is wider than a
        tile, or an option does not fit.
      FloatingPointError: with `check_finite`; it says field, step and cell.
    """
    run_options = (save_every, checkpoint, depth, overlap)
    options = StencilOptions(update, radius, boundary, steps, coefficients, corners, *run_options)
    results = None
    while results is None:
        call = _check_call(u, options, sources, receivers, check_finite, donate, spec, wafer)
        kernel = functools.partial(_per_pe, plan=call.plan, axes=call.split_axes)
        out_specs = P(*call.along), P(None, *call.along), P()
        try:
            results = _run(call, kernel, out_specs, call.donate)
        except RadiusError as error:
            options = options._replace(radius=error.radius_of_update(options.radius))
    return _finish(u, call, results, check_finite)


def stencil_tile(
    tile: Fields,
    update: Callable[..., Any],
    along: Along,
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: PyTree[ArrayLike] = None,
    corners: bool | None = None,
    checkpoint: str | None = None,
    depth: int | None = None,
    overlap: bool | None = None,
    size: Sequence[int] | None = None,
) -> Fields:
    """This PE's `tile` after `steps` steps; for kernels and for your own `jax.shard_map`.

    The result is this PE's part of what `stencil` gives for the whole field. A PE sends `depth *
    radius` cells to each neighbor once in `depth` steps, and between computes its neighbors'
    nearest cells itself. It holds two padded copies of its tiles. Differentiable, forward and
    reverse.

    Args:
      tile: a tile, or a pytree of tiles of one shape.
      update: makes tiles from tiles with `radius` more cells around; called as `update(u)`, or
        `update(u, coefficients)`, and with `step=` if it has such a parameter.
      along: for each dimension the axis that it is split over, None, or a tuple of axes.
      radius: cells that `update` takes off: one number for every dimension that it takes some off,
        or a number or a pair (low, high) for each dimension.
      boundary: what lies beyond the field in each step: "periodic", "zero", a number, "edge",
        "reflect", "symmetric", "fixed" (the `radius` cells nearest to the end stay as they are), or
        a function from the `radius` nearest cells to the ghost cells. One for all sides, or one for
        each dimension, or (low, high) for each dimension; or a dict of these by a field's name.
      steps: how many.
      coefficients: a pytree that `update` reads, this PE's tiles of it.
      corners: whether `update` reads cells diagonally across; by default as its slices say. A star
        reads none, so less is sent where each step has an exchange. Deeper halos need them.
      checkpoint: for a gradient, in reverse mode only, "sqrt" keeps sqrt(steps) states and what
        `update` needs of a few steps, and takes each step three times. None keeps everything.
      depth: steps from one exchange to the next; by default as machine, tile and `radius` suggest.
      overlap: whether a tile's inside is computed while its halo travels; by default not.
      size: cells of the whole field along each dimension; by default all tiles are full.

    Raises:
      ValueError: `update` does not take `radius` cells off or changes dtype, a halo is wider than a
        tile, or an option does not fit.
    """
    operation = "stencil_tile"
    fields, tree = jax.tree.flatten(tile)
    lines = halo.tile_lines(operation, tile, along, boundary, size)
    run_options = (None, checkpoint, depth, overlap)
    options = StencilOptions(update, radius, boundary, steps, coefficients, corners, *run_options)
    # The kernel's own wafer; None inside a `shard_map` of the user's.
    platform = _platform(context.inside())
    arrays, out = coefficient_arrays(coefficients), None
    while out is None:
        widths = geometry.width_pairs(options.radius, (*along,), operation, "radius")
        halo.check_room(operation, lines, widths, "radius")
        plan = make_plan(operation, tile, options, lines, widths, platform)
        try:
            out, _, _ = _per_pe(tuple(fields), arrays, None, None, plan=plan, axes=())
        except RadiusError as error:
            options = options._replace(radius=error.radius_of_update(options.radius))
    return jax.tree.unflatten(tree, out)


class _Call(NamedTuple):
    """One checked call of `stencil`."""

    plan: StencilPlan
    wafer: Wafer | None
    along: tuple[Axes, ...]
    operands: tuple[Tiles, Tiles, Emitters | None, Readers | None]
    donate: bool

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The axes over which the fields are split, and the records have to be summed."""
        if self.wafer is None:
            return ()
        return tuple(axis for entry in self.along for axis in axes_of(entry))


def _check_call(
    u: Fields,
    options: StencilOptions,
    sources: Sources | None,
    receivers: Receivers | None,
    check_finite: bool,
    donate: bool,
    spec: P | None,
    wafer: Wafer | None,
) -> _Call:
    operation = "stencil"
    fields = tuple(jax.tree.leaves(u))
    wafer, along, lines, radius = halo.lay_out(
        operation,
        u,
        options.boundary,
        spec,
        wafer,
        options.radius,
        "radius",
        shape_depends=False,
    )
    plan = make_plan(operation, u, options, lines, radius, _platform(wafer))
    emitters = make_emitters(sources, u, lines[0], options.steps)
    readers = make_readers(receivers, u, lines[0])
    # In a trace JAX owns the memory, and no value is known yet.
    traced = any(isinstance(field, jax.core.Tracer) for field in fields)
    _check_finite(operation, check_finite, donate, traced)
    operands = fields, coefficient_arrays(options.coefficients), emitters, readers
    return _Call(plan, wafer, along, operands, donate and not traced)


def _run(call: _Call, kernel: Callable[..., Any], out_specs: Any, donate: bool = False) -> Any:
    donate_argnums = (0,) if donate else ()  # the fields
    wafer = call.wafer
    if wafer is None:
        return local_program(kernel, donate_argnums)(*call.operands)
    fields, coefficients, emitters, readers = call.operands
    spec = P(*call.along)
    # A coefficient lies as the field does, but one cell that stands for a line is on every PE.
    specs = tuple(
        P()
        if lines is None
        else P(*(e if line.split else None for e, line in zip(call.along, lines, strict=True)))
        for lines in call.plan.coefficient_lines
    )
    # Padding repeats the last cells: the update makes new ones of it, and might divide by zeros.
    fields = tuple(layout.pad(layout.as_array(f), spec, wafer, None) for f in fields)
    coefficients = tuple(
        layout.pad(c, s, wafer, None) for c, s in zip(coefficients, specs, strict=True)
    )
    in_specs = (spec, specs, P(), P())
    run = wafer.map(kernel, in_specs=in_specs, out_specs=out_specs, donate_argnums=donate_argnums)
    return run(fields, coefficients, emitters, readers)


def _per_pe(
    fields: Tiles,
    coefficients: Tiles,
    emitters: Emitters | None,
    readers: Readers | None,
    *,
    plan: StencilPlan,
    axes: tuple[str, ...],
) -> tuple[Tiles, Tiles | None, Records]:
    run = prepare(plan, fields, coefficients, emitters, readers)
    tiles, saved, record = run_steps(run, fields)
    # A PE reads zero for another PE's receivers.
    return tiles, saved, fabric.all_reduce(record, axes) if record is not None and axes else record


def _first_not_finite_per_pe(
    fields: Tiles,
    coefficients: Tiles,
    emitters: Emitters | None,
    readers: Readers | None,
    *,
    plan: StencilPlan,
) -> Int[Array, "..."]:
    run = prepare(plan, fields, coefficients, emitters, None)
    return nan_check.first_not_finite(run, fields, plan.steps)


def _finish(
    u: Fields,
    call: _Call,
    results: tuple[Tiles, Tiles | None, Records],
    check_finite: bool,
) -> Fields:
    """What `stencil` returns: the results without padding, and those that were asked for."""
    plan, tree = call.plan, jax.tree.structure(u)
    tiles, saved, record = results
    fields = _crop(tiles, call.along, call)
    # Snapshots have a leading dimension, which is not split.
    snapshots = None if saved is None else _crop(saved, (None, *call.along), call)
    if check_finite and not nan_check.is_finite((fields, snapshots, record)):
        # A deep halo would hide in which step a cell spoiled: with depth 1 each is looked at.
        single_steps = dataclasses.replace(plan, depth=1, corners=True, checkpoint=None)
        kernel = functools.partial(_first_not_finite_per_pe, plan=single_steps)
        first = _run(call._replace(plan=single_steps), kernel, P(*call.along, None))
        nan_check.report(plan.operation, first, geometry.field_names(u), plan.steps)
    asked_for = [jax.tree.unflatten(tree, fields)]
    if snapshots is not None:
        asked_for.append(jax.tree.unflatten(tree, snapshots))
    if record is not None:
        asked_for.append(record)
    return asked_for[0] if len(asked_for) == 1 else tuple(asked_for)


def _crop(arrays: Sequence[Tile], along: tuple[Axes, ...], call: _Call) -> Tiles:
    if call.wafer is None:
        return tuple(arrays)
    shape = tuple(line.size for line in call.plan.lines[0])
    spec = P(*along)
    return tuple(
        layout.crop(a, (*a.shape[: a.ndim - len(shape)], *shape), spec, call.wafer) for a in arrays
    )


def _platform(wafer: Wafer | None) -> str:
    if wafer is None:
        return traced_platform() or WAFER
    on_devices = wafer.backend == "devices" and wafer.platform
    return on_devices or WAFER


def _check_finite(operation: str, check_finite: bool, donate: bool, traced: bool) -> None:
    if check_finite and traced:
        raise ValueError(
            f"{operation}: check_finite=True needs the values of u, which is traced; call stencil "
            "outside jit and grad, it compiles its own program"
        )
    if check_finite and donate:
        raise ValueError(
            f"{operation}: check_finite=True takes steps from u once more, and donate=True gives "
            "it away; choose one"
        )
