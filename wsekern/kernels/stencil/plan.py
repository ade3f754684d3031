"""The plan of a stencil run: its options checked, and what follows from them before any tracing."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PyTree

from wsekern.hardware import MIB
from wsekern.kernels.stencil.buffers import Fields, Mode, Pairs, Tile
from wsekern.kernels.stencil.geometry import Line, Lines

# One exchange on emulated devices takes as long as the update of so many cells: two collectives a
# dimension, of 50 to 90 us each, and about a nanosecond a cell.
_CELLS_OF_AN_EXCHANGE = 150_000
_DEEPEST = 8  # beyond, the unrolled program only takes longer to compile
# On GPUs and TPUs a step of a tile this large takes longer than its messages. Without deep halos it
# then needs no padded buffers: half their memory, and a fifth of the time to compile.
_LARGE_TILE = 2 * MIB
# A dimension of size 1 of a coefficient: its cell is whole on every PE.
_SINGLE_CELL = Line(axes=(), pes=1, tile=1, size=1, low="edge", high="edge")
WAFER = "wafer"  # the platform of virtual and abstract PEs


class StencilOptions(NamedTuple):
    """The options of a stencil as the user gave them."""

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
    """What is run, all of it static: equal plans are one compiled program."""

    operation: str  # the public function, for messages
    update: Callable[..., Any]
    tree: Any  # the structure of the fields
    coefficient_tree: Any
    takes_step: bool  # whether `update` has a parameter `step`
    lines: tuple[Lines, ...]  # for each field
    coefficient_lines: tuple[Lines | None, ...]  # None for a coefficient that is whole everywhere
    radius: Pairs
    steps: int
    depth: int  # steps from one exchange to the next
    corners: bool | None  # whether corners are exchanged; None until `update` has been traced
    platform: str  # "cpu", "gpu", "tpu", or WAFER, where a step costs memory and not messages
    overlap: bool  # whether the inside of a tile is computed while its halo travels
    save_every: int | None
    checkpoint: str | None

    @property
    def on_wafer(self) -> bool:
        return self.platform == WAFER

    @property
    def mode(self) -> Mode:
        """How the steps of a loop get their halos."""
        # GPUs and TPUs fuse the halo into the update: a step reads the tile and writes the next.
        fused = self.steps == 1 or self.platform != "cpu"
        if self.depth == 1 and (
            self.on_wafer or (fused and not self.overlap and self.checkpoint is None)
        ):
            return Mode.JOINED
        # Elsewhere cuts that wait only keep messages from traveling together: under `vmap` a loop's
        # buffer is copied anyway, and the compilers of GPUs and TPUs copy none for them.
        return Mode.CARRIED if self.platform == "cpu" else Mode.PADDED

    @property
    def unit(self) -> int:
        """Steps after which the two buffers have their places again: an even number of turns."""
        return self.depth * (1 + self.depth % 2)

    @property
    def padding(self) -> Pairs:
        """Padding of a buffer: a deep halo where a dimension is split, else one step's."""
        if self.mode is Mode.JOINED:
            return ((0, 0),) * len(self.radius)
        return self.margins(self.depth)

    def margins(self, left: int) -> Pairs:
        """The cells around a tile that the next `left` steps need."""
        return tuple(
            (left * low, left * high) if line.split else (low, high)
            for line, (low, high) in zip(self.lines[0], self.radius, strict=True)
        )

    def exchanges_before(self, j: int) -> bool:
        """Whether the halo is exchanged before the `j`th of some steps."""
        return j % self.depth == 0

    def steps_left(self, j: int, steps: int) -> int:
        """How many steps the halo has to serve before the `j`th of `steps`, that one included.

        With depth 3 and 5 steps: 3 2 1, and after the next exchange 2 1.
        """
        return min(self.depth, steps - j // self.depth * self.depth) - j % self.depth

    def region(self, left: int) -> Pairs:
        """Begin and end of the cells, counted in the tile, that the next of `left` steps makes.

        A tile of 8 cells and radius 1: `(-1, 9)` for the first of two steps, `(0, 8)` for the last.
        """
        return tuple(
            (-low, line.tile + high) if line.split else (0, line.tile)
            for line, (low, high) in zip(self.lines[0], self.margins(left - 1), strict=True)
        )

    def boxes(self, left: int) -> list[Pairs]:
        """The region in boxes: first the one that reads the tile alone, then those at the rim."""
        inside, rims = list(self.region(left)), []
        for dim, (line, (low, high)) in enumerate(zip(self.lines[0], self.radius, strict=True)):
            if not line.split:
                continue
            begin, end = inside[dim]
            for cells in ((begin, low), (line.tile - high, end)):
                rims.append((*inside[:dim], cells, *inside[dim + 1 :]))
            inside[dim] = (low, line.tile - high)
        return [tuple(inside), *(rim for rim in rims if all(a < b for a, b in rim))]


def make_plan(
    operation: str,
    u: Fields,
    options: StencilOptions,
    lines: tuple[Lines, ...],
    radius: Pairs,
    platform: str,
) -> StencilPlan:
    """The plan for fields `u`; raises ValueError where an option does not fit.

    `update` itself is checked later, when it is traced (`traced_update`).
    """
    _check_options(operation, options)
    deepest = _deepest_halo(lines[0], radius)
    depth = options.depth
    if depth is not None and depth > deepest:
        raise ValueError(
            f"{operation}: depth={depth} with radius {radius} needs a halo wider than the smallest "
            f"tile; the largest depth is {deepest}"
        )
    if depth is None and options.checkpoint is None and _needs_no_depth(u, lines, radius, platform):
        depth = 1
    elif depth is None:
        depth = _cheapest_depth(lines[0], radius, deepest, platform)
    depth = max(1, min(depth, options.save_every or options.steps or 1))
    return StencilPlan(
        operation=operation,
        update=options.update,
        tree=jax.tree.structure(u),
        coefficient_tree=jax.tree.structure(options.coefficients),
        takes_step="step" in _parameters(options.update),
        lines=lines,
        coefficient_lines=_coefficient_lines(options.coefficients, lines[0]),
        radius=radius,
        steps=options.steps,
        depth=depth,
        # Deeper halos need the corners, for the cells that a PE computes for its neighbors.
        corners=True if depth > 1 else options.corners,
        platform=platform,
        overlap=_can_overlap(options.overlap, lines[0], radius, platform),
        save_every=options.save_every,
        checkpoint=options.checkpoint,
    )


def coefficient_arrays(coefficients: PyTree[ArrayLike]) -> tuple[Tile, ...]:
    return tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(coefficients))


def _coefficient_lines(coefficients: PyTree[ArrayLike], lines: Lines) -> tuple[Lines | None, ...]:
    """For each coefficient its lines; None for one that is whole on every PE."""

    def of_leaf(leaf: ArrayLike) -> Lines | None:
        if jnp.ndim(leaf) != len(lines):
            return None
        return tuple(
            _SINGLE_CELL if size == 1 else line.for_coefficient()
            for size, line in zip(jnp.shape(leaf), lines, strict=True)
        )

    return tuple(of_leaf(leaf) for leaf in jax.tree.leaves(coefficients))


def _deepest_halo(lines: Lines, radius: Pairs) -> int:
    """How many steps one exchange can serve, as a halo comes from one neighbor's tile."""
    depths = [
        line.last_cells // max(pair)
        for line, pair in zip(lines, radius, strict=True)
        if line.split and max(pair)
    ]
    return min(depths, default=2**30)


def _can_overlap(overlap: bool | None, lines: Lines, radius: Pairs, platform: str) -> bool:
    """Whether the inside of a tile is computed apart: by default not.

    On CPU devices nothing travels beside the computation. On GPUs and TPUs, by their compilers, the
    rim computed apart takes longer than what is waited for, and a third buffer.
    """
    inside = [
        line.tile - sum(pair)
        for line, pair in zip(lines, radius, strict=True)
        if line.split and max(pair)
    ]
    return bool(overlap) and platform != WAFER and bool(inside) and min(inside) >= 1


def _parameters(update: Callable[..., Any]) -> Sequence[str]:
    try:
        return list(inspect.signature(update).parameters)
    except ValueError:  # a builtin, which has no signature
        return []


def _needs_no_depth(u: Fields, lines: tuple[Lines, ...], radius: Pairs, platform: str) -> bool:
    """Whether nothing is gained by deep halos, on GPUs and TPUs."""
    if platform in ("cpu", WAFER):
        return False
    is_split = any(line.split and max(pair) for line, pair in zip(lines[0], radius, strict=True))
    cells = math.prod(line.tile for line in lines[0])
    itemsize = min(jnp.result_type(field).itemsize for field in jax.tree.leaves(u))
    return not is_split or cells * itemsize >= _LARGE_TILE


def _cheapest_depth(lines: Lines, radius: Pairs, deepest: int, platform: str) -> int:
    """How many steps one exchange should serve, by the time of an exchange and of a cell.

    On a wafer, virtual or abstract, a neighbor is two cycles away: computing its cells too gains
    nothing.
    """
    split = [i for i, line in enumerate(lines) if line.split and max(radius[i])]
    if platform == WAFER and split:
        return 1
    if not split:
        return 2  # nothing is sent, and two steps are what the buffers need to take turns

    def cost_of_a_step(depth: int) -> float:
        cells = [
            math.prod(
                line.tile + ((depth - 1 - j) * sum(radius[d]) if d in split else 0)
                for d, line in enumerate(lines)
            )
            for j in range(depth)
        ]
        return (_CELLS_OF_AN_EXCHANGE * len(split) + sum(cells)) / depth

    # Even depths: after them the fields lie in the buffer where they began. Of a halo of one cell
    # XLA copies the whole buffer at each exchange, so depth 1 is only for tiles that need it.
    depths = [depth for depth in (2, 4, 6, _DEEPEST) if depth <= deepest]
    return min(depths, key=cost_of_a_step, default=1)


def _check_options(operation: str, options: StencilOptions) -> None:
    for name, smallest in {"steps": 0, "save_every": 1, "depth": 1}.items():
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int) or value < smallest):
            raise ValueError(
                f"{operation}: {name}={value!r} must be an integer of {smallest} or more"
            )
    if options.checkpoint not in (None, "sqrt"):
        raise ValueError(f"{operation}: checkpoint={options.checkpoint!r} is not 'sqrt' or None")
