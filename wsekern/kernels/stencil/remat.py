"""This file is many steps of which a gradient keeps few states, and takes steps again; per PE.

Steps go in units, of which a gradient keeps what each step needs, and units in segments of about
the square root of their number, each kept by its start. So each step is taken three times, as in A.
Griewank and A. Walther, "Algorithm 799: Revolve", 2000, with about as many states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.wafer import context

if TYPE_CHECKING:
    from wsekern.kernels.stencil.plan import StencilPlan
    from wsekern.kernels.stencil.steps import Run

# Unrolled in the program. More are fewer states and fewer copies, and a unit that leaves the cache.
_UNIT = 4


def advance(run: Run, tiles, begin, steps: int):
    """`run.advance`, of which a gradient in reverse keeps few states."""
    if run.plan.on_wafer:
        return _nested(run, tiles, begin, steps)
    return _kept(run.varying(), tiles, begin, steps)


class _Parts(NamedTuple):
    """How steps are divided: segments of `length` units of `unit` steps, then units, then steps."""

    unit: int
    length: int
    segments: int
    units: int
    rest: int

    @classmethod
    def of(cls, plan: StencilPlan, steps: int) -> _Parts:
        unit = plan.unit * max(1, _UNIT // plan.unit)
        units = steps // unit
        length = max(1, math.isqrt(units))
        return cls(unit, length, units // length, units % length, steps % unit)

    @property
    def done(self) -> int:
        """Steps of all segments."""
        return self.segments * self.length * self.unit

    @staticmethod
    def begins(begin, times: int, size: int) -> jax.Array:
        return begin + size * jnp.arange(times, dtype=jnp.int32)


# Under `jax.vmap` a loop's custom adjoint is traced where the names of axes are unknown.
def _nested(run, tiles, begin, steps):
    parts = _Parts.of(run.plan, steps)

    @jax.checkpoint
    def unit(tiles, begin):
        return run.advance(tiles, begin, parts.unit)

    @jax.checkpoint
    def segment(tiles, begin):
        return run.loop(lambda t, b, _: unit(t, b), tiles, begin, parts.length, parts.unit)

    size = parts.length * parts.unit
    tiles, first = run.loop(lambda t, b, _: segment(t, b), tiles, begin, parts.segments, size)
    begin = begin + parts.done
    tiles, second = run.loop(lambda t, b, _: unit(t, b), tiles, begin, parts.units, parts.unit)
    tiles, last = run.advance(tiles, begin + parts.units * parts.unit, parts.rest)
    if run.readers is None:
        return tiles, None
    return tiles, jnp.concatenate([first, second, last])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kept(run, tiles, begin, steps):
    return _kept_fwd(run, tiles, begin, steps)[0]


# The steps back are a program of their own, in which cells gather their cotangents.
def _kept_fwd(run, tiles, begin, steps):
    parts = _Parts.of(run.plan, steps)

    def segment(buffers, begin):
        end, record = run.loop(run.blocks, buffers, begin, parts.length, parts.unit)
        return end, (record, buffers[0])

    begins = parts.begins(begin, parts.segments, parts.length * parts.unit)
    buffers, (first, starts) = lax.scan(segment, run.buffers(tiles), begins)
    begin_of_last = begin + parts.done
    end, second = run.loop(run.blocks, buffers, begin_of_last, parts.units, parts.unit)
    end, last = run.blocks(end, begin + steps - parts.rest, parts.rest)
    record = None
    if run.readers is not None:
        record = jnp.concatenate([first.reshape(parts.done, run.readers.count), second, last])
    return (run.tiles(end[0]), record), (run, begin, starts, buffers[0])


def _kept_bwd(steps, residuals, cotangents):
    run, begin, starts, last = residuals
    dtiles, heard = cotangents
    parts = _Parts.of(run.plan, steps)
    done = parts.done
    if heard is not None and heard.dtype == jax.dtypes.float0:
        heard = None
    owed = (
        [jnp.zeros_like(x) for x in _floating(run)[0]],
        list(run.buffers(_floating(dtiles)[0])[0]),
    )
    owed = _back(run, owed, last, begin + done, parts, parts.units, parts.rest, _part(heard, done))

    def segment(owed, of_it):
        start, begin, heard = of_it
        return _back(run, owed, start, begin, parts, parts.length, 0, heard), None

    size = parts.length * parts.unit
    heard = _by(heard, run, parts.segments, size)
    begins = parts.begins(begin, parts.segments, size)
    (drun, dnow), _ = lax.scan(segment, owed, (starts, begins, heard), reverse=True)
    return _floating(run)[1](drun, None), _floating(last)[1](run.tiles(dnow), None), None


_kept.defvjp(_kept_fwd, _kept_bwd)


def _back(run, owed, start, begin, parts, units, rest, heard):
    """What is owed to `run` and to `start`, from which units and single steps are taken."""

    def ahead(buffers, begin):
        return run.blocks(buffers, begin, parts.unit)[0], buffers[0]

    begins, done = parts.begins(begin, units, parts.unit), units * parts.unit
    now = start
    if units:  # a loop of no turns would be compiled too
        (now, _), starts = lax.scan(ahead, (start, start), begins)
    if rest:
        owed = _unit_back(run, owed, now, begin + done, rest, _part(heard, done))
    if not units:
        return owed

    def unit(owed, of_it):
        now, begin, heard = of_it
        return _unit_back(run, owed, now, begin, parts.unit, heard), None

    heard = _by(heard, run, units, parts.unit)
    return lax.scan(unit, owed, (starts, begins, heard), reverse=True)[0]


def _unit_back(run, owed, now, begin, steps, heard):
    run_of, now_of = _floating(run)[1], _floating(now)[1]

    def ahead(of_run, of_now):
        after, end, record = run_of(of_run, run).backward(now_of(of_now, now), begin, steps)
        return (_floating(after)[0], _floating(end)[0]), None if heard is None else record

    with context.differentiating():
        _, pull = jax.vjp(ahead, _floating(run)[0], _floating(now)[0])
    return pull((owed, heard))


def _part(heard, done):
    return None if heard is None else heard[done:]


def _by(heard, run, times, size):
    """What is owed to the readings of the first `times * size` steps, by `size` of them."""
    return None if heard is None else heard[: times * size].reshape(times, size, run.readers.count)


def _floating(tree: Any) -> tuple[list[jax.Array], Callable[[Any, Any], Any]]:
    """The leaves that have a gradient, and the tree of such leaves and of others' values."""
    leaves, structure = jax.tree.flatten(tree)
    own = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def together(floating, others):
        held = [None] * len(leaves) if others is None else jax.tree.leaves(others)
        for i, leaf in zip(own, floating, strict=True):
            held[i] = leaf
        return jax.tree.unflatten(structure, held)

    return [leaves[i] for i in own], together
