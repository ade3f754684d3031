"""This file is many steps in one compiled loop, on one PE's padded tiles; per PE.

Two padded buffers take turns: a step reads one and writes the other in place. So no step copies a
field, and the compiler, which cannot fuse through a write in place, evaluates no step twice.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, boundary, cpu_fusion, remat, sources
from wsekern.kernels.stencil.boundary import Pairs
from wsekern.kernels.stencil.exchange import exchange, joined, padded
from wsekern.kernels.stencil.geometry import Line
from wsekern.kernels.stencil.plan import StencilPlan


def run_steps(
    plan: StencilPlan,
    fields: Sequence[jax.Array],
    coefficients: Sequence[jax.Array],
    emitters: Any,
    readers: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...] | None, jax.Array | None]:
    """The tiles after all steps, snapshots, and what the receivers on this PE read."""
    state = prepare(plan, coefficients, emitters, readers)
    advance = state.advance if plan.checkpoint is None else functools.partial(remat.advance, state)
    every = plan.save_every
    if every is None:
        out, record = advance(tuple(fields), 0, plan.steps)
        return out, None, record

    def save(tiles, begin):
        tiles, record = advance(tiles, begin, every)
        return tiles, (tiles, record)

    times = plan.steps // every
    begins = jnp.arange(times, dtype=jnp.int32) * every
    tiles, (saved, records) = lax.scan(save, tuple(fields), begins)
    done = times * every
    out, rest = advance(tiles, done, plan.steps - done)
    if rest is None:
        return out, saved, None
    return out, saved, jnp.concatenate([records.reshape(done, readers.count), rest])


def prepare(
    plan: StencilPlan, coefficients: Sequence[jax.Array], emitters: Any, readers: Any
) -> "Run":
    """What runs the plan, its coefficients with their halos."""
    return Run(plan, _around(plan, coefficients), emitters, readers)


def _around(plan: StencilPlan, coefficients: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The coefficients that are split, with as deep a halo as the fields."""
    held = list(coefficients)
    split = [i for i, own in enumerate(plan.coefficient_lines) if own is not None]
    own_lines = [own for own in plan.coefficient_lines if own is not None]
    at = [_widths(own, plan.margins(plan.depth)) for own in own_lines]
    buffers = [padded(held[i], width) for i, width in zip(split, at, strict=True)]
    if buffers:
        buffers = exchange(buffers, own_lines, at, fresh=True)
    for i, buffer, own, width in zip(split, buffers, own_lines, at, strict=True):
        [held[i]] = boundary.fill([buffer], [own], at=width, margins=width, radius=width)
    return tuple(held)


def _widths(own: Sequence[Line], widths: Pairs) -> Pairs:
    return tuple((0, 0) if l.size == 1 else pair for l, pair in zip(own, widths, strict=True))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("coefficients", "emitters", "readers"),
    meta_fields=("plan",),
)
@dataclasses.dataclass(frozen=True)
class Run:
    """A plan and what its steps read."""

    plan: StencilPlan
    coefficients: tuple[Any, ...]  # arrays, or what stands for them while a pytree is taken apart
    emitters: Any
    readers: Any

    def advance(self, tiles, begin, steps: int):
        """The tiles `steps` steps later, and the readings `[steps, points]` of this PE."""
        unit = self.plan.unit
        done = steps // unit * unit
        buffers = self.buffers(tiles)
        buffers, first = self.loop(self.blocks, buffers, begin, steps // unit, unit)
        buffers, last = self.blocks(buffers, begin + done, steps - done, fresh=done == 0)
        if self.readers is None:
            return self.tiles(buffers[0]), None
        return self.tiles(buffers[0]), jnp.concatenate([first, last])

    def loop(self, body, carry, begin, times: int, unit: int):
        """`body` as often as `times`, and all its readings in order."""
        if times == 0:  # it would be compiled all the same
            return carry, None if self.readers is None else jnp.zeros((0, self.readers.count))
        begins = begin + unit * jnp.arange(times, dtype=jnp.int32)
        carry, records = lax.scan(lambda c, b: body(c, b, unit), carry, begins)
        return carry, None if records is None else records.reshape(times * unit, self.readers.count)

    def backward(self, now, begin, steps: int):
        """This run, the buffers after steps in memory of their own, and the readings.

        To be differentiated in reverse: as `adjoint` says, the run comes back with what is held.
        """
        run, records = self, []
        for j in range(steps):
            left = self.plan.left(j, steps)
            exchanges = j % self.plan.depth == 0
            now = run._surrounded(now, left, begin + j, exchanges, backward=True)
            other = tuple(jnp.zeros_like(b) for b in now)
            new, run = run._gathered(now, left, begin + j)
            now = run._written(
                now, other, [(new, self.plan.region(left))], begin + j, backward=True
            )
            if self.readers is not None:
                records.append(
                    sources.read(self.readers, now, self.plan.lines[0], self.plan.padding)
                )
        return run, now, jnp.stack(records) if records else None

    def varying(self) -> "Run":
        """This run with what it holds typed as each PE's own, whose gradient is summed once."""
        names = tuple(name for line in self.plan.lines[0] if line.parts > 1 for name in line.names)
        return fabric.varying(self, names)

    def buffers(self, tiles):
        buffers = tuple(padded(t, self.plan.padding) for t in tiles)
        return buffers, buffers

    def tiles(self, buffers):
        low = [pair[0] for pair in self.plan.padding]
        end = [pair[0] + line.tile for pair, line in zip(self.plan.padding, self.plan.lines[0])]  # noqa: B905
        return tuple(lax.slice(b, low, end) for b in buffers)

    def blocks(self, buffers, begin, steps: int, fresh: bool = False):
        """`steps` steps unrolled, with an exchange before each `depth` of them."""
        records = []
        now, other = buffers
        for j in range(steps):
            left, exchanges = self.plan.left(j, steps), j % self.plan.depth == 0
            early, step = now, begin + j
            now = self._surrounded(now, left, step, exchanges, fresh=fresh and j == 0)
            if exchanges and self.plan.overlaps:
                new = self._in_parts(self._surrounded(early, left, step, False), now, left, step)
            else:
                region = self.plan.region(left)
                new = [(self._new(now, region, step), region)]
            now, other = self._written(now, other, new, step), now
            if self.readers is not None:
                records.append(
                    sources.read(self.readers, now, self.plan.lines[0], self.plan.padding)
                )
        if self.readers is None:
            return (now, other), None
        return (now, other), jnp.stack(records) if records else jnp.zeros((0, self.readers.count))

    def _surrounded(
        self, now, left: int, step, exchanges: bool, *, fresh: bool = False, backward: bool = False
    ):
        """The buffers as a step reads them from which `left` steps are to be taken."""
        plan = self.plan
        if plan.joins:
            return now
        at, margins = plan.padding, plan.margins(left)
        if exchanges:
            now = exchange(
                now,
                plan.lines,
                [at] * len(now),
                corners=plan.corners,
                fresh=not backward and (plan.on_wafer or fresh),
                backward=backward,
            )
        filled = boundary.fill(
            now,
            plan.lines,
            at=at,
            margins=margins,
            radius=plan.radius,
            step=step if plan.on_cpus and not backward else None,
            backward=backward,
        )
        return tuple(filled)

    def _new(self, now, box: Pairs, step) -> list[jax.Array]:
        """The cells `box` of the new fields, each of the update's arrays computed once."""
        update = functools.partial(self._updated, box=box, step=step)
        operands = (*now, *self.coefficients)
        return (
            cpu_fusion.sparing(update, step, *operands) if self.plan.on_cpus else update(*operands)
        )

    def _updated(self, *operands, box: Pairs, step) -> list[jax.Array]:
        """The cells `box` of the new fields, from fields and coefficients as they are kept."""
        plan = self.plan
        now, held = operands[: len(plan.lines)], operands[len(plan.lines) :]
        if plan.joins:
            windows = joined(now, plan.lines, plan.radius, corners=plan.corners)
        else:
            windows = [_around_box(b, plan.padding, box, plan.radius) for b in now]
        margins = plan.margins(plan.depth)
        around = [
            c
            if own is None
            else _around_box(c, _widths(own, margins), *_along(own, box, plan.radius))
            for c, own in zip(held, plan.coefficient_lines, strict=True)
        ]
        new = plan.call(
            jax.tree.unflatten(plan.tree, windows),
            jax.tree.unflatten(plan.coefficients, around),
            step,
        )
        return jax.tree.leaves(new)

    def _gathered(self, now, left: int, step):
        """The new fields, and this run again, as `adjoint.gathering` passes on what is held."""
        update = functools.partial(self._updated, box=self.plan.region(left), step=step)
        gather = jax.checkpoint(functools.partial(adjoint.gathering, update))
        new, held = gather(list(now), list(self.coefficients))
        return new, dataclasses.replace(self, coefficients=tuple(held))

    def _in_parts(self, early, now, left: int, step):
        """The new fields in boxes, the one inside of what was there before the exchange."""
        inside, *rims = self.plan.boxes(left)
        parts = [(early, inside), *((now, rim) for rim in rims)]
        return [(self._new(fields, box, step), box) for fields, box in parts]

    def _written(self, now, other, parts, step, *, backward: bool = False):
        """The new fields in `other`'s memory, with their sources, and `now`'s rim where fixed."""
        plan, out = self.plan, list(other)
        for new, box in parts:
            starts = [pair[0] + begin for pair, (begin, _) in zip(plan.padding, box, strict=True)]
            out = new if plan.joins else [
                lax.dynamic_update_slice(b, n, starts) for b, n in zip(out, new, strict=True)
            ]  # fmt: skip
        out = [
            boundary.hold_rim(n, o, own, at=plan.padding, radius=plan.radius, backward=backward)
            for n, o, own in zip(out, now, plan.lines, strict=True)
        ]
        if self.emitters is not None:
            out = sources.emit(self.emitters, out, plan.lines[0], plan.padding, step)
        return tuple(out)


def _along(own: Sequence[Line], box: Pairs, radius: Pairs) -> tuple[Pairs, Pairs]:
    """`box` and `radius` of a coefficient, which may have one cell for a whole line."""
    alone = [line.size == 1 for line in own]
    cells = tuple((0, 1) if one else pair for one, pair in zip(alone, box, strict=True))
    return cells, _widths(own, radius)


def _around_box(buffer: jax.Array, at: Pairs, box: Pairs, radius: Pairs) -> jax.Array:
    """The cells `box` and as many around them as `radius`, of a tile between `at` of padding."""
    low = [pair[0] + cells[0] - r[0] for pair, cells, r in zip(at, box, radius, strict=True)]
    end = [pair[0] + cells[1] + r[1] for pair, cells, r in zip(at, box, radius, strict=True)]
    return lax.slice(buffer, low, end)
