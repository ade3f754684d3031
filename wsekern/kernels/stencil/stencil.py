"""This file is stencils: a user's update of a tile with its halo, taken many steps.

Deep halos, exchanged once for several steps, are from C. Ding and Y. He, "A Ghost Cell Expansion
Method for Reducing Communications in Solving PDE Problems", 2001.

`update(u)` maps tiles with their halo, of any size, to new tiles without it. It is called as
`update(u, coefficients)` where there are some, and with `step=`, counted from 0, if it has a
parameter of that name. Coefficients with as many dimensions as the field are split as it is and
have the same halo, but for dimensions of size 1; beyond the field lie their own last cells, or the
other end where it is periodic. Other ones are whole on every PE. For a star, which reads no cell
diagonally across, less is sent where there is one step to an exchange; deeper halos need corners.

Fields of a staggered grid have one shape: a cell is kept with its faces to the east and south. The
face before the first cell is then a ghost, and the one after the last cell is kept with it: between
walls, with the boundary ("zero", "fixed"), it stays as it is given.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from wsekern import fabric
from wsekern.kernels.stencil import geometry, halo, nan_check
from wsekern.kernels.stencil.geometry import Boundary, Width
from wsekern.kernels.stencil.halo import Along
from wsekern.kernels.stencil.plan import StencilOptions, make_plan
from wsekern.kernels.stencil.sources import Receivers, Sources, make_emitters, make_readers
from wsekern.kernels.stencil.steps import prepare, run_steps
from wsekern.wafer import context, layout
from wsekern.wafer.axes import axes_of
from wsekern.wafer.program import local_program
from wsekern.wafer.wafer import Wafer


def stencil(
    u: Any,
    update: Callable[..., Any],
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: Any = None,
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
) -> Any:
    """`u` after `steps` steps of `update`, the same field on every mesh.

    A PE sends a message to each neighbor once in `depth` steps, of `depth * radius` cells in depth,
    and between computes its neighbors' nearest cells itself. It holds two padded copies of its
    tiles. Differentiable, forward and reverse.

    Args:
      u: a field, or a pytree of fields of one shape.
      update: from tiles with `radius` cells around to new tiles; how it is called stands above.
      radius: cells that `update` takes off, as the `width` of `halo_exchange`.
      boundary: as in `halo_exchange`, in each step; "fixed" holds `radius` cells still.
      steps: how many.
      coefficients: a pytree that `update` reads.
      corners: whether `update` reads cells diagonally across; by default as its slices say.
      sources: what is added to a field at points after each step.
      receivers: where a field is read after each step.
      save_every: after how many steps each a snapshot is kept.
      checkpoint: "sqrt" keeps for a gradient, in reverse mode alone, sqrt(steps) states and what
        `update` needs of a few steps, and takes each three times; None keeps what it needs of all.
      depth: steps from one exchange to the next; by default as machine, tile and `radius` suggest.
      overlap: whether a tile's inside is computed apart from its rim, while the halo travels; by
        default where devices are no CPUs.
      check_finite: outside jit, whether to find out where a result that is not finite began.
      donate: outside jit, whether the result may take the memory of `u`, which is gone then.
      spec: as in `halo_exchange`.
      wafer: as in `halo_exchange`.

    Returns:
      `u`; with `save_every` also snapshots `[steps // save_every, ...]`; with `receivers` also,
      last, what they read, `[steps, points]`.

    Raises:
      ValueError: `update` does not take `radius` cells off or changes dtype, a halo is wider than
        a tile, or an option does not fit.
      FloatingPointError: with `check_finite`; says field, step and cell.
    """
    kept = (save_every, checkpoint, depth, overlap)
    options = StencilOptions(update, radius, boundary, steps, coefficients, corners, *kept)
    return _stencil(u, options, sources, receivers, check_finite, donate, spec, wafer)


def stencil_tile(
    tile: Any,
    update: Callable[..., Any],
    along: Along,
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: Any = None,
    corners: bool | None = None,
    checkpoint: str | None = None,
    depth: int | None = None,
    overlap: bool | None = None,
    size: Sequence[int] | None = None,
) -> Any:
    """This PE's `tile` after `steps` steps; for kernels and for your own `jax.shard_map`.

    Args:
      tile: a tile, or a pytree of tiles of one shape.
      update: as in `stencil`.
      along: for each dimension the axis that it is split over, None, or a tuple of axes.
      radius: as in `stencil`.
      boundary: as in `stencil`.
      steps: as in `stencil`.
      coefficients: as in `stencil`, this PE's tiles of them.
      corners: as in `stencil`.
      checkpoint: as in `stencil`.
      depth: as in `stencil`.
      overlap: as in `stencil`.
      size: cells of the whole field along each dimension; by default all tiles are full.

    Raises:
      ValueError: as `stencil`.
    """
    what = "stencil_tile"
    fields, tree = jax.tree.flatten(tile)
    halo.check_fields(what, fields)
    along = (*along,)
    lines = halo.tile_lines(what, tile, along, boundary, size)
    widths = geometry.widths(radius, along, what, "radius")
    kept = (None, checkpoint, depth, overlap)
    options = StencilOptions(update, radius, boundary, steps, coefficients, corners, *kept)
    plan = make_plan(what, tile, options, lines, widths, _on_wafer_here(), jax.default_backend())
    held = plan.coefficients_of(coefficients)
    out, _, _ = _per_pe(tuple(fields), held, None, None, plan=plan, along=along)
    return jax.tree.unflatten(tree, out)


def _stencil(u, options, sources, receivers, check_finite, donate, spec, wafer):
    what = "stencil"
    fields, tree = jax.tree.flatten(u)
    halo.check_fields(what, fields)
    wafer, along = geometry.home(u, spec, wafer)
    shape = fields[0].shape
    radius = geometry.widths(options.radius, along, what, "radius")
    parts = (1,) * len(shape)
    if wafer is not None:
        parts = tuple(layout.parts(P(entry), wafer) for entry in along)
    lines = tuple(
        geometry.of_field(shape, along, side, parts, what)
        for side in geometry.by_field(options.boundary, u)
    )
    on_wafer = wafer is not None and wafer.backend != "devices"
    plan = make_plan(what, u, options, lines, radius, on_wafer, _platform(wafer))
    emitters = make_emitters(sources, u, lines[0], options.steps)
    readers = make_readers(receivers, u, lines[0])
    traced = any(isinstance(field, jax.core.Tracer) for field in fields)
    _check_finite(what, check_finite, donate, traced)
    coefficients = plan.coefficients_of(options.coefficients)
    operands = (tuple(fields), coefficients, emitters, readers)
    split = along if wafer is not None else ()
    laid = (P(*along), P(None, *along), P())
    kernel = functools.partial(_per_pe, plan=plan, along=split)
    out, saved, record = _run(kernel, operands, along, plan, wafer, laid, donate and not traced)
    out = _cropped(out, along, plan, wafer)
    if saved is not None:
        saved = _cropped(saved, (None, *along), plan, wafer)
    if check_finite and not nan_check.is_finite((out, saved, record)):
        alone = dataclasses.replace(plan, depth=1, corners=True, checkpoint=None)
        look = functools.partial(_began_per_pe, plan=alone)
        found = _run(look, operands, along, alone, wafer, P(*along, None))
        nan_check.report(what, found, geometry.field_names(u), options.steps)
    return _results(tree, out, saved, record, options.save_every, receivers)


def _per_pe(fields, coefficients, emitters, readers, *, plan, along):
    out, saved, record = run_steps(plan, fields, coefficients, emitters, readers)
    if record is not None:
        names = tuple(n for entry in along if entry for n in axes_of(entry))
        record = fabric.all_reduce(record, names) if names else record
    return out, saved, record


def _began_per_pe(fields, coefficients, emitters, readers, *, plan):
    return nan_check.began(prepare(plan, coefficients, emitters, None), fields, plan.steps)


def _run(kernel, operands, along, plan, wafer, out_specs, donate=False):
    donated = (0,) if donate else ()
    if wafer is None:
        return local_program(kernel, donated)(*operands)
    fields, coefficients, emitters, readers = operands
    laid = P(*along)
    specs = tuple(
        P() if own is None else P(*(e if l.parts > 1 else None for e, l in zip(along, own)))  # noqa: B905
        for own in plan.coefficient_lines
    )
    fields = tuple(layout.pad(layout.as_array(f), laid, wafer, None) for f in fields)
    coefficients = tuple(
        layout.pad(c, s, wafer, None) for c, s in zip(coefficients, specs, strict=True)
    )
    run = wafer.map(
        kernel, in_specs=(laid, specs, P(), P()), out_specs=out_specs, donate_argnums=donated
    )
    return run(fields, coefficients, emitters, readers)


def _cropped(arrays, along, plan, wafer):
    if wafer is None:
        return arrays
    shape = tuple(line.size for line in plan.lines[0])
    return tuple(
        layout.crop(a, (*a.shape[: a.ndim - len(shape)], *shape), P(*along), wafer) for a in arrays
    )


def _on_wafer_here() -> bool:
    wafer = context.inside()
    return wafer is not None and wafer.backend != "devices"


def _platform(wafer: Wafer | None) -> str:
    if wafer is None or wafer.backend != "devices":
        return jax.default_backend()
    return wafer.device_mesh.devices.flat[0].platform


def _results(tree, out, saved, record, save_every, receivers):
    results = [jax.tree.unflatten(tree, out)]
    if save_every is not None:
        results.append(jax.tree.unflatten(tree, saved))
    if receivers is not None:
        results.append(record)
    return results[0] if len(results) == 1 else tuple(results)


def _check_finite(what, check_finite, donate, traced):
    if check_finite and traced:
        raise ValueError(
            f"{what}: check_finite=True needs the values of u, which is traced; call stencil "
            "outside jit and grad, it compiles its own program"
        )
    if check_finite and donate:
        raise ValueError(
            f"{what}: check_finite=True takes steps from u once more, and donate=True gives it "
            "away; choose one"
        )
