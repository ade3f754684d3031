"""This file is many steps of which a gradient keeps few states, and takes steps again; per PE.

A. Griewank and A. Walther, "Algorithm 799: Revolve", 2000. Steps are taken in units, of which a
gradient keeps what each step needs, and units in segments, each kept by its start.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from wsekern.kernels.stepping import Run

_KEPT_STEPS = 8  # of a unit, at most; unrolled in the program


def advance(run: Run, tiles, begin, steps: int):
    """`run.advance`, with a gradient that keeps a state for each root of the number of units."""
    depth = run.plan.depth
    unit = depth * max(1, _KEPT_STEPS // depth)
    units = steps // unit
    length = max(1, math.isqrt(units))
    # Under `jax.vmap`, names of axes are unknown where a loop's custom adjoint is traced.
    take = _taken_again if run.plan.on_wafer else _unit

    def segment(tiles, begin):
        return run.loop(lambda t, b, _: take(run, t, b, unit), tiles, begin, length, unit)

    def kept(tiles, begin, _):
        return jax.checkpoint(segment)(tiles, begin)

    tiles, first = run.loop(kept, tiles, begin, units // length, unit * length)
    done = units // length * length * unit
    tiles, second = run.loop(
        lambda t, b, _: take(run, t, b, unit), tiles, begin + done, units % length, unit
    )
    done = units * unit
    tiles, last = take(run, tiles, begin + done, steps - done)
    if run.readers is None:
        return tiles, None
    return tiles, jnp.concatenate([first, second, last])


def _taken_again(run, tiles, begin, steps):
    return jax.checkpoint(lambda run, t, b: run.advance(t, b, steps))(run, tiles, begin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unit(run, tiles, begin, steps):
    return run.advance(tiles, begin, steps)


# The steps back follow another program than those that are only taken: see `adjoint`.
def _unit_fwd(run, tiles, begin, steps):
    return _unit(run, tiles, begin, steps), (run, tiles, begin)


def _unit_bwd(steps, residuals, cotangents):
    run, tiles, begin = residuals
    _, pull = jax.vjp(lambda run, tiles: run.backward(tiles, begin, steps), run, tiles)
    return *pull(cotangents), None


_unit.defvjp(_unit_fwd, _unit_bwd)
