"""This file is stencils: a user's update of a tile with its halo, taken many steps.

Deep halos, exchanged once for several steps, are from C. Ding and Y. He, "A Ghost Cell Expansion
Method for Reducing Communications in Solving PDE Problems", 2001.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from wsekern import context, fabric, layout, readings
from wsekern.kernels import halo, points, stepping
from wsekern.kernels import lines as geometry
from wsekern.kernels.halo import Along
from wsekern.kernels.lines import Boundary, Line, Width
from wsekern.kernels.local import program_of
from wsekern.wafer import Wafer

_ONE = Line(names=(), parts=1, tile=1, size=1, low="edge", high="edge")


def stencil(
    u: Any,
    update: Callable[..., Any],
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: Any = None,
    corners: bool = True,
    sources: points.Sources | None = None,
    receivers: points.Receivers | None = None,
    save_every: int | None = None,
    checkpoint: str | None = None,
    depth: int | None = None,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Any:
    """`u` after `steps` steps of `update`, the same field on every mesh.

    A PE sends a message to each neighbor once in `depth` steps, of `depth * radius` cells in depth;
    between, it computes the neighbors' nearest cells itself. It holds two padded copies of its
    tiles, which take turns. Donate `u` to your own jit to have its memory used for the result.
    Differentiable, forward and reverse.

    Args:
      u: a field, or a pytree of fields of one shape.
      update: from tiles with `radius` cells around, to new tiles without them; for any size of
        tile. Called as `update(u)`, or `update(u, coefficients)` where there are some, which have
        the same cells around; and with `step=`, from 0, if it has a parameter of that name. Cells
        beyond an end follow `boundary` in each step.
      radius: cells that `update` takes off: one number for every dimension that is split, or a
        number or a pair (low, high) for each dimension. A dimension of radius 0 is left alone.
      boundary: as in `halo_exchange`; "fixed" holds the `radius` cells at that side still.
      steps: how many.
      coefficients: what `update` reads and does not change, a pytree. Arrays with as many
        dimensions as `u` are split as it is, but for dimensions of size 1; around them lie their
        own last cells, or the other end where `u` is periodic. Others are whole on every PE.
      corners: whether `update` reads cells diagonally across. One that does not, a star, sends less
        where there is one step to an exchange; deeper halos need corners in any case.
      sources: what is added to a field at points after each step.
      receivers: where a field is read after each step.
      save_every: after how many steps each a snapshot is kept.
      checkpoint: "sqrt" keeps about 2 * sqrt(steps / depth) states for the gradient and takes each
        step three times; None keeps what `update` needs of each step.
      depth: steps from one exchange to the next; by default as the machine, the tile and `radius`
        suggest. The result is the same.
      spec: as in `halo_exchange`.
      wafer: as in `halo_exchange`.

    Returns:
      `u` after the last step; with `save_every`, that and snapshots `[steps // save_every, ...]`;
      with `receivers`, also the readings `[steps, points]`, last.

    Raises:
      ValueError: `update` changes dtype or does not take `radius` cells off, a halo is wider than
        a tile, a boundary is unknown, or an option does not fit.
    """
    what = "stencil"
    fields, tree = jax.tree.flatten(u)
    halo.check_fields(what, fields)
    wafer, along = geometry.home(u, spec, wafer)
    shape = fields[0].shape
    widths = geometry.widths(radius, along, what, "radius")
    parts = (1,) * len(shape)
    if wafer is not None:
        parts = tuple(layout.parts(P(entry), wafer) for entry in along)
    lines = tuple(
        geometry.of_field(shape, along, side, parts, what)
        for side in geometry.by_field(boundary, u)
    )
    plan = _plan(
        what, u, update, lines, widths, steps, save_every, checkpoint, depth, coefficients, corners,
        on_wafer=wafer is not None and wafer.reading != "devices",
    )  # fmt: skip
    emitters = points.emitters(sources, u, lines[0], steps)
    readers = points.readers(receivers, u, lines[0])
    kernel = functools.partial(_per_pe, plan=plan, along=along)
    operands = (tuple(fields), plan.coefficients_of(coefficients), emitters, readers)
    if wafer is None:
        out, saved, record = program_of(kernel)(*operands)
    else:
        out, saved, record = _on_wafer(kernel, operands, along, plan, wafer)
    return _results(tree, out, saved, record, save_every, receivers)


def stencil_tile(
    tile: Any,
    update: Callable[..., Any],
    along: Along,
    *,
    radius: Width | Sequence[Width],
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    steps: int = 1,
    coefficients: Any = None,
    corners: bool = True,
    checkpoint: str | None = None,
    depth: int | None = None,
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
      size: cells of the whole field along each dimension; by default all tiles are full.

    Raises:
      ValueError: as `stencil`.
    """
    what = "stencil_tile"
    fields, tree = jax.tree.flatten(tile)
    halo.check_fields(what, fields)
    lines = halo.tile_lines(what, tile, along, boundary, size)
    widths = geometry.widths(radius, along, what, "radius")
    plan = _plan(
        what, tile, update, lines, widths, steps, None, checkpoint, depth, coefficients, corners,
        on_wafer=_on_wafer_here(),
    )  # fmt: skip
    leaves = plan.coefficients_of(coefficients)
    out, _, _ = _per_pe(tuple(fields), leaves, None, None, plan=plan, along=tuple(along))
    return jax.tree.unflatten(tree, out)


def _plan(
    what, u, update, lines, radius, steps, save_every, checkpoint, depth, coefficients, corners,
    *, on_wafer,
) -> stepping.Plan:  # fmt: skip
    halo.check_room(what, lines, radius, "radius")
    _check(what, steps, save_every, checkpoint, depth)
    most = _deepest(lines, radius)
    if depth is not None and depth > most:
        raise ValueError(
            f"{what}: depth={depth} with radius {radius} needs a halo wider than the smallest "
            f"tile; the largest depth is {most}"
        )
    if depth is None:
        depth = stepping.depth(lines[0], radius, most, on_wafer)
    _, tree = jax.tree.flatten(u)
    plan = stepping.Plan(
        update=update,
        tree=tree,
        coefficients=jax.tree.structure(coefficients),
        told_step="step" in _parameters(update),
        lines=lines,
        coefficient_lines=_coefficient_lines(coefficients, lines[0]),
        radius=radius,
        steps=steps,
        depth=max(1, min(depth, save_every or steps or 1)),
        corners=corners or min(depth, save_every or steps or 1) > 1,
        on_wafer=on_wafer,
        save_every=save_every,
        checkpoint=checkpoint,
    )
    _check_update(what, plan, u, coefficients)
    return plan


def _per_pe(fields, coefficients, emitters, readers, *, plan, along):
    out, saved, record = stepping.run(plan, fields, coefficients, emitters, readers)
    if record is not None:
        names = tuple(n for entry in along if entry for n in readings.axes_of(entry))
        record = fabric.all_reduce(record, names) if names else record
    return out, saved, record


def _on_wafer(kernel, operands, along, plan, wafer):
    fields, coefficients, emitters, readers = operands
    laid = P(*along)
    specs = tuple(
        P() if own is None else P(*(e if l.parts > 1 else None for e, l in zip(along, own)))  # noqa: B905
        for own in plan.coefficient_lines
    )
    fields = tuple(layout.pad(f, laid, wafer, None) for f in fields)
    coefficients = tuple(
        layout.pad(c, s, wafer, None) for c, s in zip(coefficients, specs, strict=True)
    )
    run = wafer.map(
        kernel,
        in_specs=(laid, specs, P(), P()),
        out_specs=(laid, P(None, *along), P()),
    )
    out, saved, record = run(fields, coefficients, emitters, readers)
    shape = tuple(line.size for line in plan.lines[0])
    out = tuple(layout.crop(f, shape, laid, wafer) for f in out)
    if saved is not None:
        saved = tuple(layout.crop(s, (s.shape[0], *shape), P(None, *along), wafer) for s in saved)
    return out, saved, record


def _on_wafer_here() -> bool:
    wafer = context.inside()
    return wafer is not None and wafer.reading != "devices"


def _results(tree, out, saved, record, save_every, receivers):
    results = [jax.tree.unflatten(tree, out)]
    if save_every is not None:
        results.append(jax.tree.unflatten(tree, saved))
    if receivers is not None:
        results.append(record)
    return results[0] if len(results) == 1 else tuple(results)


def _coefficient_lines(
    coefficients: Any, lines: tuple[Line, ...]
) -> tuple[tuple[Line, ...] | None, ...]:
    """For each coefficient its lines; None for one that is whole on every PE."""

    def of(leaf):
        if jnp.ndim(leaf) != len(lines):
            return None
        return tuple(
            _ONE if size == 1 else line.beside()
            for size, line in zip(jnp.shape(leaf), lines, strict=True)
        )

    return tuple(of(leaf) for leaf in jax.tree.leaves(coefficients))


def _deepest(lines, radius) -> int:
    """How many steps one exchange can serve."""
    most = [
        line.rest // max(pair)
        for line, pair in zip(lines[0], radius, strict=True)
        if line.parts > 1 and max(pair)
    ]
    return min(most, default=2**30)


def _parameters(update: Callable) -> Sequence[str]:
    try:
        return list(inspect.signature(update).parameters)
    except ValueError:  # a function that does not tell
        return []


def _check(what, steps, save_every, checkpoint, depth):
    for name, value, least in (
        ("steps", steps, 0), ("save_every", save_every, 1), ("depth", depth, 1)
    ):  # fmt: skip
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{what}: {name}={value!r} must be an integer of {least} or more")
    if checkpoint not in (None, "sqrt"):
        raise ValueError(f"{what}: checkpoint={checkpoint!r} is not 'sqrt' or None")


def _check_update(what, plan, u, coefficients):
    """Traces `update` once on tiles with their halo, before anything is compiled."""
    tiles = [line.tile for line in plan.lines[0]]
    around = [n + sum(pair) for n, pair in zip(tiles, plan.radius, strict=True)]

    def shaped(leaf, lines):
        if lines is None:
            return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        sizes = [1 if l.size == 1 else n for l, n in zip(lines, around, strict=True)]
        return jax.ShapeDtypeStruct(sizes, jnp.result_type(leaf))

    fields = jax.tree.map(lambda f: jax.ShapeDtypeStruct(around, f.dtype), u)
    leaves, tree = jax.tree.flatten(coefficients)
    shapes = [shaped(c, own) for c, own in zip(leaves, plan.coefficient_lines, strict=True)]
    step = jax.ShapeDtypeStruct((), jnp.int32)
    new = jax.eval_shape(plan.call, fields, jax.tree.unflatten(tree, shapes), step)
    if jax.tree.structure(new) != plan.tree:
        raise ValueError(
            f"{what}: update makes {jax.tree.structure(new)} of fields {plan.tree}; it must give "
            "the fields that it takes"
        )
    for field, made in zip(jax.tree.leaves(u), jax.tree.leaves(new), strict=True):
        if made.shape != tuple(tiles):
            off = [a - b for a, b in zip(around, made.shape, strict=False)]
            raise ValueError(
                f"{what}: radius is {plan.radius}, so update must make {tuple(tiles)} of "
                f"{tuple(around)}, and it makes {made.shape}: it takes {off} cells off"
            )
        if made.dtype != field.dtype:
            raise ValueError(
                f"{what}: update makes {made.dtype} of {field.dtype}; cast what it returns, or "
                "its constants"
            )
