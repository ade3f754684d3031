"""Gradient checkpointing for long runs, per PE: keep O(sqrt(steps)) states, recompute the rest.

Steps go in units of a few, and units in segments of about the square root of their number. The
forward pass keeps the first state of each segment. The backward pass takes a segment's steps again,
keeps the first state of each unit, and takes each unit's steps a third time to differentiate them:
A. Griewank and A. Walther, "Algorithm 799: Revolve", 2000, with about as many states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree, Shaped

from wsekern.kernels.stencil.buffers import Fields, Step, Tile, Tiles
from wsekern.kernels.stencil.sources import Records, join_records
from wsekern.wafer import context

if TYPE_CHECKING:
    from wsekern.kernels.stencil.plan import StencilPlan
    from wsekern.kernels.stencil.steps import StencilRun

# Steps of a unit, unrolled in the program. With more there are fewer states and fewer copies, but a
# unit no longer fits the cache.
_UNIT = 4

# Cotangents of the run's floating arrays and of the buffers.
Cotangents = tuple[list[Tile], list[Tile]]


def advance(run: StencilRun, tiles: Tiles, begin: Step, steps: int) -> tuple[Tiles, Records]:
    """`run.advance`, with a reverse-mode gradient that keeps few states."""
    if run.plan.on_wafer:
        return _nested_checkpoints(run, tiles, begin, steps)
    return _advance_with_checkpoints(run, tiles, begin, steps)


class _Division(NamedTuple):
    """How steps are divided: `segments` of `length` units, then `units`, then single steps.

    21 steps in units of 4: two segments of two units each, one unit more, one step more.
    """

    unit: int  # steps of a unit
    length: int  # units of a segment
    segments: int
    units: int  # after the segments
    steps: int  # after the units

    @classmethod
    def of(cls, plan: StencilPlan, steps: int) -> _Division:
        unit = _steps_of_a_unit(plan)
        units = steps // unit
        length = max(1, math.isqrt(units))
        return cls(unit, length, units // length, units % length, steps % unit)

    @property
    def in_segments(self) -> int:
        """Steps of all segments."""
        return self.segments * self.length * self.unit


def _steps_of_a_unit(plan: StencilPlan) -> int:
    return plan.unit * max(1, _UNIT // plan.unit)


# Under `jax.vmap` a loop's custom_vjp rule is traced where the names of axes are unknown, so on
# virtual PEs `jax.checkpoint` does it.
def _nested_checkpoints(
    run: StencilRun, tiles: Tiles, begin: Step, steps: int
) -> tuple[Tiles, Records]:
    division = _Division.of(run.plan, steps)

    @jax.checkpoint
    def unit(tiles: Tiles, begin: Step) -> tuple[Tiles, Records]:
        return run.advance(tiles, begin, division.unit)

    @jax.checkpoint
    def segment(tiles: Tiles, begin: Step) -> tuple[Tiles, Records]:
        return run.loop(lambda t, b, _: unit(t, b), tiles, begin, division.length, division.unit)

    size = division.length * division.unit
    tiles, first = run.loop(lambda t, b, _: segment(t, b), tiles, begin, division.segments, size)
    begin = begin + division.in_segments
    tiles, second = run.loop(
        lambda t, b, _: unit(t, b), tiles, begin, division.units, division.unit
    )
    tiles, last = run.advance(tiles, begin + division.units * division.unit, division.steps)
    return tiles, join_records(first, second, last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _advance_with_checkpoints(
    run: StencilRun, tiles: Tiles, begin: Step, steps: int
) -> tuple[Tiles, Records]:
    return _advance_with_checkpoints_fwd(run, tiles, begin, steps)[0]


# The backward pass is a program of its own, in which cells gather their cotangents (`adjoint`).
def _advance_with_checkpoints_fwd(
    run: StencilRun, tiles: Tiles, begin: Step, steps: int
) -> tuple[tuple[Tiles, Records], tuple[Any, ...]]:
    division = _Division.of(run.plan, steps)

    def segment(
        buffers: tuple[Tiles, Tiles], begin: Step
    ) -> tuple[tuple[Tiles, Tiles], tuple[Records, Tiles]]:
        end, record = run.loop(run.take_steps, buffers, begin, division.length, division.unit)
        return end, (record, buffers[0])

    begins = _begins(begin, division.segments, division.length * division.unit)
    buffers, (first, starts) = lax.scan(segment, run.two_buffers(tiles), begins)
    begin_of_last = begin + division.in_segments
    end, second = run.loop(run.take_steps, buffers, begin_of_last, division.units, division.unit)
    end, last = run.take_steps(end, begin + steps - division.steps, division.steps)
    if first is not None:
        first = first.reshape(division.in_segments, first.shape[-1])
    records = join_records(first, second, last)
    return (run.tiles(end[0]), records), (run, begin, starts, buffers[0])


def _advance_with_checkpoints_bwd(
    steps: int, residuals: tuple[Any, ...], cotangents: tuple[Fields, Fields]
) -> tuple[StencilRun, Tiles, None]:
    run, begin, starts, last = residuals
    dtiles, drecords = cotangents
    division = _Division.of(run.plan, steps)
    done = division.in_segments
    if drecords is not None and drecords.dtype == jax.dtypes.float0:
        drecords = None
    current = (
        [jnp.zeros_like(x) for x in _floating(run)[0]],
        list(run.two_buffers(tuple(_floating(dtiles)[0]))[0]),
    )
    # What the forward pass did last comes first.
    current = _back_through_units(
        run, current, last, begin + done, division.units, division.steps, _tail(drecords, done)
    )

    def segment(current: Cotangents, saved: tuple[Tiles, Step, Records]) -> tuple[Cotangents, None]:
        start, begin, drecords = saved
        return _back_through_units(run, current, start, begin, division.length, 0, drecords), None

    size = division.length * division.unit
    drecords = _in_groups(drecords, division.segments, size)
    begins = _begins(begin, division.segments, size)
    (drun, dnow), _ = lax.scan(segment, current, (starts, begins, drecords), reverse=True)
    return _floating(run)[1](drun, None), _floating(last)[1](run.tiles(tuple(dnow)), None), None


_advance_with_checkpoints.defvjp(_advance_with_checkpoints_fwd, _advance_with_checkpoints_bwd)


def _back_through_units(
    run: StencilRun,
    current: Cotangents,
    start: Tiles,
    begin: Step,
    units: int,
    steps: int,
    drecords: Records,
) -> Cotangents:
    """The cotangents before some units and single steps, taken once more from `start`."""
    unit = _steps_of_a_unit(run.plan)

    def ahead(buffers: tuple[Tiles, Tiles], begin: Step) -> tuple[tuple[Tiles, Tiles], Tiles]:
        return run.take_steps(buffers, begin, unit)[0], buffers[0]

    begins, done = _begins(begin, units, unit), units * unit
    now = start
    if units:  # XLA would compile a loop of no turns too
        (now, _), starts = lax.scan(ahead, (start, start), begins)
    if steps:
        of_steps = _tail(drecords, done)
        current = _back_through_steps(run, current, now, begin + done, steps, of_steps)
    if not units:
        return current

    def back(current: Cotangents, saved: tuple[Tiles, Step, Records]) -> tuple[Cotangents, None]:
        now, begin, drecords = saved
        return _back_through_steps(run, current, now, begin, unit, drecords), None

    drecords = _in_groups(drecords, units, unit)
    return lax.scan(back, current, (starts, begins, drecords), reverse=True)[0]


def _back_through_steps(
    run: StencilRun, current: Cotangents, now: Tiles, begin: Step, steps: int, drecords: Records
) -> Cotangents:
    rebuild_run, rebuild_now = _floating(run)[1], _floating(now)[1]

    def ahead(run_arrays: list[Tile], buffers: list[Tile]) -> tuple[Cotangents, Records]:
        traced_run = rebuild_run(run_arrays, run)
        after, end, record = traced_run.take_steps_reverse(rebuild_now(buffers, now), begin, steps)
        results = _floating(after)[0], _floating(end)[0]
        return results, None if drecords is None else record

    with context.differentiating():
        _, pull = jax.vjp(ahead, _floating(run)[0], _floating(now)[0])
    return pull((current, drecords))


def _begins(begin: Step, times: int, size: int) -> Int[Array, " times"]:
    return begin + size * jnp.arange(times, dtype=jnp.int32)


def _tail(drecords: Records, done: int) -> Records:
    return None if drecords is None else drecords[done:]


def _in_groups(
    drecords: Records, times: int, size: int
) -> Shaped[Array, "{times} {size} points"] | None:
    """The cotangents of the first `times * size` records, in groups of `size` steps."""
    if drecords is None:
        return None
    return drecords[: times * size].reshape(times, size, drecords.shape[-1])


def _floating(tree: Fields) -> tuple[list[Tile], Callable[[Iterable[Tile], PyTree], PyTree]]:
    """The leaves that have a gradient, and a function that puts new ones into the tree.

    It takes the other leaves from its second argument, or puts None there.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def rebuild(floating: Iterable[Tile], others: PyTree) -> PyTree:
        values = [None] * len(leaves) if others is None else jax.tree.leaves(others)
        for i, leaf in zip(places, floating, strict=True):
            values[i] = leaf
        return jax.tree.unflatten(structure, values)

    return [leaves[i] for i in places], rebuild
