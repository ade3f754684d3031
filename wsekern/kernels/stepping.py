"""This file is many steps in one compiled loop, on one PE's padded tiles; per PE.

Two padded buffers take turns: a step reads one and writes the other in place. So no step copies a
field, and the compiler, which cannot fuse through a write in place, evaluates no step twice.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.kernels import boundary as ends
from wsekern.kernels import points
from wsekern.kernels.boundary import Pairs
from wsekern.kernels.lines import Line
from wsekern.kernels.neighbors import exchange, joined, padded

# One exchange on emulated devices costs as much time as the update of so many cells: 50 to 90 us a
# collective, of which there are two a dimension, at about a cell a nanosecond.
_CELLS_OF_AN_EXCHANGE = 150_000
_KEPT_STEPS = 10  # of which a gradient with checkpoints keeps what `update` needs, at most
_DEEPEST = 8  # beyond, the unrolled program only takes longer to compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
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
    def joins(self) -> bool:
        """Whether a tile and its halo are joined anew in each step, instead of kept padded.

        The transpose of a join is a cut, that of a write into a buffer a copy of it.
        """
        return self.depth == 1 and (self.on_wafer or self.checkpoint is not None)

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


def depth(lines: Sequence[Line], radius: Pairs, most: int, on_wafer: bool) -> int:
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


def run(
    plan: Plan,
    fields: Sequence[jax.Array],
    coefficients: Sequence[jax.Array],
    emitters: Any,
    readers: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None, jax.Array | None]:
    """The tiles after all steps, snapshots, and what the receivers on this PE read."""
    state = _Run(plan, _around(plan, coefficients), emitters, readers)
    every = plan.save_every
    if every is None:
        out, record = state.advance(tuple(fields), 0, plan.steps)
        return out, None, record

    def save(tiles, begin):
        tiles, record = state.advance(tiles, begin, every)
        return tiles, (tiles, record)

    times = plan.steps // every
    begins = jnp.arange(times, dtype=jnp.int32) * every
    tiles, (saved, records) = lax.scan(save, tuple(fields), begins)
    done = times * every
    out, rest = state.advance(tiles, done, plan.steps - done)
    if rest is None:
        return out, saved, None
    return out, saved, jnp.concatenate([records.reshape(done, readers.count), rest])


def _around(plan: Plan, coefficients: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The coefficients that are split, with as deep a halo as the fields."""
    held = list(coefficients)
    split = [i for i, own in enumerate(plan.coefficient_lines) if own is not None]
    own_lines = [own for own in plan.coefficient_lines if own is not None]
    at = [_widths(own, plan.margins(plan.depth)) for own in own_lines]
    buffers = [padded(held[i], width) for i, width in zip(split, at, strict=True)]
    if buffers:
        buffers = exchange(buffers, own_lines, at, fresh=True)
    for i, buffer, own, width in zip(split, buffers, own_lines, at, strict=True):
        held[i] = ends.fill(buffer, own, at=width, margins=width, radius=width)
    return tuple(held)


def _widths(own: Sequence[Line], widths: Pairs) -> Pairs:
    return tuple((0, 0) if l.size == 1 else pair for l, pair in zip(own, widths, strict=True))


@dataclasses.dataclass(frozen=True)
class _Run:
    plan: Plan
    coefficients: tuple[jax.Array, ...]
    emitters: Any
    readers: Any

    def advance(self, tiles, begin, steps: int):
        """The tiles `steps` steps later, and the readings `[steps, points]` of this PE."""
        if self.plan.checkpoint is not None:
            unit = min(_KEPT_STEPS, max(1, round(steps ** (1 / 3))))
            done = steps // unit * unit
            tiles, first = self._segments(tiles, begin, steps // unit, unit)
            tiles, last = self._from_tiles(tiles, begin + done, steps - done)
        else:
            unit = self.plan.depth * (1 + self.plan.depth % 2)  # an even number of turns
            done = steps // unit * unit
            buffers = self._buffers(tiles)
            buffers, first = self._loop(self._blocks, buffers, begin, steps // unit, unit)
            buffers, last = self._blocks(buffers, begin + done, steps - done, fresh=done == 0)
            tiles = self._tiles(buffers)
        if self.readers is None:
            return tiles, None
        return tiles, jnp.concatenate([first, last])

    def _segments(self, tiles, begin, units: int, unit: int):
        """Units in segments of about the square root of their number, each kept by its start."""
        # What is carried is the tiles alone, for it is what is kept: the padding is made anew.
        one = jax.checkpoint(lambda t, b: self._from_tiles(t, b, unit))
        length = max(1, math.isqrt(units))

        def segment(tiles, begin):
            return self._loop(lambda t, b, _: one(t, b), tiles, begin, length, unit)

        def outer(t, b, _):
            return jax.checkpoint(segment)(t, b)

        tiles, first = self._loop(outer, tiles, begin, units // length, unit * length)
        done = units // length * length
        tiles, rest = self._loop(
            lambda t, b, _: one(t, b), tiles, begin + done * unit, units - done, unit
        )
        return tiles, None if first is None else jnp.concatenate([first, rest])

    def _loop(self, body, carry, begin, times: int, unit: int):
        """`body` as often as `times`, and all its readings in order."""
        begins = begin + unit * jnp.arange(times, dtype=jnp.int32)
        carry, records = lax.scan(lambda c, b: body(c, b, unit), carry, begins)
        return carry, None if records is None else records.reshape(times * unit, self.readers.count)

    def _from_tiles(self, tiles, begin, steps: int):
        # A loop: of steps in a row XLA would fuse two, and evaluate the first for each neighbor.
        def one(tiles, begin, unit):
            buffers, record = self._blocks(self._buffers(tiles), begin, unit, fresh=True)
            return self._tiles(buffers), record

        return self._loop(one, tiles, begin, steps, 1)

    def _buffers(self, tiles):
        buffers = tuple(padded(t, self.plan.padding) for t in tiles)
        return buffers, buffers

    def _tiles(self, buffers):
        low = [pair[0] for pair in self.plan.padding]
        end = [pair[0] + line.tile for pair, line in zip(self.plan.padding, self.plan.lines[0])]  # noqa: B905
        return tuple(lax.slice(b, low, end) for b in buffers[0])

    def _blocks(self, buffers, begin, steps: int, fresh: bool = False):
        """`steps` steps unrolled, with an exchange before each `depth` of them."""
        plan, records = self.plan, []
        now, other = buffers
        for j in range(steps):
            left = min(plan.depth, steps - j // plan.depth * plan.depth) - j % plan.depth
            if j % plan.depth == 0 and not plan.joins:
                at = [plan.padding] * len(now)
                cut_first = plan.on_wafer or (fresh and j == 0)
                now = tuple(exchange(now, plan.lines, at, corners=plan.corners, fresh=cut_first))
            now, other = self._step(now, other, left, begin + j), now
            if self.readers is not None:
                records.append(points.read(self.readers, now, plan.lines[0], plan.padding))
        if self.readers is None:
            return (now, other), None
        return (now, other), jnp.stack(records) if records else jnp.zeros((0, self.readers.count))

    def _step(self, now, other, left: int, step):
        """The fields one step later, in `other`'s memory, when `left` steps are to be taken."""
        plan, at = self.plan, self.plan.padding
        if plan.joins:
            windows = joined(now, plan.lines, plan.radius, corners=plan.corners)
        else:
            margins = plan.margins(left)
            now = [
                ends.fill(b, own, at=at, margins=margins, radius=plan.radius)
                for b, own in zip(now, plan.lines, strict=True)
            ]
            windows = [_window(b, plan.lines[0], at, margins) for b in now]
        new = plan.call(
            jax.tree.unflatten(plan.tree, windows),
            jax.tree.unflatten(plan.coefficients, self._held(left)),
            step,
        )
        out = jax.tree.leaves(new)
        if not plan.joins:
            after = plan.margins(left - 1)
            starts = [
                pair[0] - (margin[0] if line.parts > 1 else 0)
                for pair, margin, line in zip(at, after, plan.lines[0], strict=True)
            ]
            out = [lax.dynamic_update_slice(b, n, starts) for b, n in zip(other, out, strict=True)]
        out = [
            ends.hold_rim(n, o, own, at=at, radius=plan.radius)
            for n, o, own in zip(out, now, plan.lines, strict=True)
        ]
        if self.emitters is not None:
            out = points.emit(self.emitters, out, plan.lines[0], at, step)
        return tuple(out)

    def _held(self, left: int) -> list[jax.Array]:
        """The coefficients, around which there are the cells that `left` steps need."""
        plan = self.plan
        at, margins = plan.margins(plan.depth), plan.margins(left)
        return [
            c if own is None else _window(c, own, _widths(own, at), _widths(own, margins))
            for c, own in zip(self.coefficients, plan.coefficient_lines, strict=True)
        ]


def _window(buffer, lines, at, margins):
    low = [pair[0] - margin[0] for pair, margin in zip(at, margins, strict=True)]
    end = [
        pair[0] + line.tile + margin[1]
        for pair, line, margin in zip(at, lines, margins, strict=True)
    ]
    return lax.slice(buffer, low, end)
