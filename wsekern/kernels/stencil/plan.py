"""This file is how a stencil's plan comes from what is asked for, with all checks of it."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wsekern.kernels.stencil import adjoint, halo
from wsekern.kernels.stencil.boundary import Pairs
from wsekern.kernels.stencil.geometry import Line
from wsekern.wafer.program import local_program

# One exchange on emulated devices costs as much time as the update of so many cells: 50 to 90 us a
# collective, of which there are two a dimension, at about a cell a nanosecond.
_CELLS_OF_AN_EXCHANGE = 150_000
_DEEPEST = 8  # beyond, the unrolled program only takes longer to compile
_ONE = Line(names=(), parts=1, tile=1, size=1, low="edge", high="edge")


class StencilOptions(NamedTuple):
    """What is asked for, as it was given."""

    update: Callable[..., Any]
    radius: Any
    boundary: Any
    steps: int
    coefficients: Any
    corners: bool | None
    save_every: int | None
    checkpoint: str | None
    depth: int | None
    overlap: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StencilPlan:
    """What is run, all of it static."""

    update: Callable[..., Any]
    tree: Any  # of the fields
    coefficients: Any  # their tree
    told_step: bool  # whether `update` takes `step=`
    lines: tuple[tuple[Line, ...], ...]  # for each field
    coefficient_lines: tuple[tuple[Line, ...] | None, ...]
    radius: Pairs
    steps: int
    depth: int  # steps from one exchange to the next
    corners: bool  # whether `update` reads them
    on_wafer: bool  # virtual or abstract PEs, where a step costs memory and not messages
    on_cpus: bool  # devices that are CPUs, whose compiler is told what to compute once
    overlaps: bool  # whether the inside of a tile is computed while its halo travels
    save_every: int | None
    checkpoint: str | None

    def call(self, fields: Any, coefficients: Any, step: Any) -> Any:
        """The user's update, with what it takes."""
        named = {"step": step} if self.told_step else {}
        if self.coefficients.num_leaves:
            return self.update(fields, coefficients, **named)
        return self.update(fields, **named)

    def coefficients_of(self, coefficients: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(coefficients))

    @property
    def unit(self) -> int:
        """Steps after which the two buffers have their places again: an even number of turns."""
        return self.depth * (1 + self.depth % 2)

    @property
    def joins(self) -> bool:
        """Whether a tile and its halo are joined anew in each step, instead of kept padded."""
        alone = self.steps == 1 and not self.overlaps and self.checkpoint is None
        return self.depth == 1 and (self.on_wafer or alone)

    @property
    def padding(self) -> Pairs:
        """Of a buffer: a deep halo where a dimension is split, else one step's."""
        return ((0, 0),) * len(self.radius) if self.joins else self.margins(self.depth)

    def margins(self, left: int) -> Pairs:
        """The cells around a tile that the next `left` steps need."""
        return tuple(
            (left * low, left * high) if line.parts > 1 else (low, high)
            for line, (low, high) in zip(self.lines[0], self.radius, strict=True)
        )

    def left(self, j: int, steps: int) -> int:
        """How many steps the halo shall still serve before the `j`th of `steps`."""
        return min(self.depth, steps - j // self.depth * self.depth) - j % self.depth

    def region(self, left: int) -> Pairs:
        """Begin and end of the cells, counted in the tile, that the next of `left` steps makes."""
        return tuple(
            (-low, line.tile + high) if line.parts > 1 else (0, line.tile)
            for line, (low, high) in zip(self.lines[0], self.margins(left - 1), strict=True)
        )

    def boxes(self, left: int) -> list[Pairs]:
        """The region in parts: first what reads the tile alone, then what needs its neighbors."""
        inside, rims = list(self.region(left)), []
        for dim, (line, (low, high)) in enumerate(zip(self.lines[0], self.radius, strict=True)):
            if line.parts == 1:
                continue
            begin, end = inside[dim]
            for cells in ((begin, low), (line.tile - high, end)):
                rims.append((*inside[:dim], cells, *inside[dim + 1 :]))
            inside[dim] = (low, line.tile - high)
        return [tuple(inside), *(rim for rim in rims if all(a < b for a, b in rim))]


def make_plan(
    what: str,
    u: Any,
    options: StencilOptions,
    lines: tuple[tuple[Line, ...], ...],
    radius: Pairs,
    on_wafer: bool,
    platform: str,
) -> StencilPlan:
    """The plan for fields `u`, all of it checked; `what` is the name in messages."""
    halo.check_room(what, lines, radius, "radius")
    _check(what, options)
    most = _deepest(lines, radius)
    depth = options.depth
    if depth is not None and depth > most:
        raise ValueError(
            f"{what}: depth={depth} with radius {radius} needs a halo wider than the smallest "
            f"tile; the largest depth is {most}"
        )
    if depth is None:
        depth = _steps_to_an_exchange(lines[0], radius, most, on_wafer)
    depth = max(1, min(depth, options.save_every or options.steps or 1))
    plan = StencilPlan(
        update=options.update,
        tree=jax.tree.structure(u),
        coefficients=jax.tree.structure(options.coefficients),
        told_step="step" in _parameters(options.update),
        lines=lines,
        coefficient_lines=_coefficient_lines(options.coefficients, lines[0]),
        radius=radius,
        steps=options.steps,
        depth=depth,
        corners=options.corners is not False or depth > 1,
        on_wafer=on_wafer,
        on_cpus=not on_wafer and platform == "cpu",
        overlaps=not on_wafer and _overlaps(options.overlap, lines[0], radius, platform),
        save_every=options.save_every,
        checkpoint=options.checkpoint,
    )
    shapes = _around_tiles(plan, u, options.coefficients)
    _check_update(what, plan, u, shapes)
    if options.corners is None and depth == 1:
        plan = dataclasses.replace(plan, corners=_reads_corners(plan, shapes))
    return plan


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


def _overlaps(asked, lines, radius, platform) -> bool:
    """Whether a tile is split: on CPU devices nothing travels beside the computation."""
    inside = [
        line.tile - sum(pair)
        for line, pair in zip(lines, radius, strict=True)
        if line.parts > 1 and max(pair)
    ]
    if not inside or min(inside) < 1:
        return False
    return platform != "cpu" if asked is None else asked


def _around_tiles(plan, u, coefficients):
    """The shapes of a tile of each field, and of each coefficient, with the cells around it."""
    around = [line.tile + sum(pair) for line, pair in zip(plan.lines[0], plan.radius, strict=True)]

    def shaped(leaf, lines):
        if lines is None:
            return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
        sizes = [1 if l.size == 1 else n for l, n in zip(lines, around, strict=True)]
        return jax.ShapeDtypeStruct(sizes, jnp.result_type(leaf))

    fields = jax.tree.map(lambda f: jax.ShapeDtypeStruct(around, f.dtype), u)
    leaves, tree = jax.tree.flatten(coefficients)
    held = [shaped(c, own) for c, own in zip(leaves, plan.coefficient_lines, strict=True)]
    return fields, jax.tree.unflatten(tree, held)


def _reads_corners(plan, shapes) -> bool:
    """Whether `update` reads cells diagonally across, as far as its slices tell."""
    leaves, tree = jax.tree.flatten(shapes)
    fields = leaves[: len(plan.lines)]

    def update(*leaves):
        return jax.tree.leaves(plan.call(*jax.tree.unflatten(tree, leaves), jnp.int32(0)))

    if not all(jnp.issubdtype(field.dtype, jnp.floating) for field in fields):
        return True
    for windows in adjoint.windows(update, leaves)[: len(fields)]:
        for low, high in windows:
            beyond = [
                begin < pair[0] or end > pair[0] + line.tile
                for begin, end, pair, line in zip(
                    low, high, plan.radius, plan.lines[0], strict=True
                )
            ]
            if sum(beyond) > 1:
                return True
    return False


def _parameters(update: Callable) -> Sequence[str]:
    try:
        return list(inspect.signature(update).parameters)
    except ValueError:  # a function that does not tell
        return []


def _steps_to_an_exchange(lines: Sequence[Line], radius: Pairs, most: int, on_wafer: bool) -> int:
    """How many steps one exchange shall serve, by the time of an exchange and of a cell.

    On a wafer, virtual or abstract, a neighbor is two cycles away and nothing is gained by
    computing its cells too.
    """
    split = [i for i, line in enumerate(lines) if line.parts > 1 and max(radius[i])]
    if on_wafer and split:
        return 1
    if not split:
        return 2  # nothing is sent, and two steps are what the buffers need to take turns

    def cost(k: int) -> float:
        cells = [
            math.prod(
                line.tile + ((k - 1 - j) * sum(radius[d]) if d in split else 0)
                for d, line in enumerate(lines)
            )
            for j in range(k)
        ]
        return (_CELLS_OF_AN_EXCHANGE * len(split) + sum(cells)) / k

    # Even ones: after them the fields lie in the buffer where they began. Of a halo of one cell XLA
    # copies the whole buffer at each exchange, so one step at a time is for tiles that need it.
    depths = [k for k in (2, 4, 6, _DEEPEST) if k <= most]
    return min(depths, key=cost, default=1)


def _check(what, options):
    least = {"steps": 0, "save_every": 1, "depth": 1}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int) or value < smallest):
            raise ValueError(f"{what}: {name}={value!r} must be an integer of {smallest} or more")
    if options.checkpoint not in (None, "sqrt"):
        raise ValueError(f"{what}: checkpoint={options.checkpoint!r} is not 'sqrt' or None")


def _check_update(what, plan, u, shapes):
    """Traces `update` once on tiles with their halo, before anything is compiled."""
    tiles = [line.tile for line in plan.lines[0]]
    around = [n + sum(pair) for n, pair in zip(tiles, plan.radius, strict=True)]
    call = local_program(
        functools.partial(StencilPlan.call, plan)
    )  # traced once for all that are alike
    new = jax.eval_shape(call, *shapes, jax.ShapeDtypeStruct((), jnp.int32))
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
