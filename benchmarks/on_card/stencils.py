"""Stencils on the card: heat, a wave and the shallow sea, against whole arrays in plain jnp."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import wsekern as wk
from benchmarks import harness, plain_sea, plain_stencil
from benchmarks.example import example
from benchmarks.on_card.race import Build, on_wafers, race
from benchmarks.on_card.session import Session

_COST = 6.0  # seconds to compile and time one candidate
_ARRAY = "jnp, whole arrays"


def run(session: Session) -> None:
    """Races heat, wave and sea. A cell's bytes are those of the fewest reads and writes a step."""
    size, steps = (128, 4) if session.small else (8192, 100)
    timed = functools.partial(
        race,
        session,
        peer=_ARRAY,
        work=size**2 * steps,
        unit="cells/s",
        ceiling=session.ceilings.bandwidth,
        cost=_COST,
    )
    shape = f"{size} x {size}, {steps} steps, float32"
    for name in ("5-point", "9-point"):  # reads u, writes it
        timed(f"{name} heat, {shape}", _heat(name, size, steps), per_work=8)
    # Reads u, u of the step before and the speed, writes u.
    timed(f"wave, {shape}", _waves(size, steps), per_work=16)
    # Reads and writes six fields, reads the depth.
    timed(f"shallow sea, {shape}", _seas(size, steps), per_work=52)


def wave(state: dict[str, Any], c: Any) -> dict[str, Any]:
    """One step of the wave equation, from tiles with one cell more around."""
    inside = (slice(1, -1),) * 2
    u = state["u"]
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    new = 2 * u[inside] - state["before"][inside] + c[inside] * (around - 4 * u[inside])
    return {"u": new, "before": u[inside]}


def _heat(name: str, size: int, steps: int) -> dict[str, Build]:
    def ours(make_wafer: Callable) -> harness.CompiledProgram:
        step_by = functools.partial(
            wk.stencil,
            update=plain_stencil.UPDATES[name],
            radius=plain_stencil.RADII[name],
            boundary="periodic",
            steps=steps,
            wafer=make_wafer(),
        )
        return harness.compile_program(step_by, _noise(size))

    def plain() -> harness.CompiledProgram:
        rolled = functools.partial(plain_stencil.step_by_roll, name=name, steps=steps)
        return harness.compile_program(rolled, _noise(size))

    return {_ARRAY: plain, **on_wafers(ours, one_pe=name == "5-point")}


def _waves(size: int, steps: int) -> dict[str, Build]:
    def state() -> tuple[dict[str, jax.Array], jax.Array]:
        u = _noise(size)
        return {"u": u, "before": u}, jnp.full_like(u, 0.2)

    def ours(make_wafer: Callable) -> harness.CompiledProgram:
        def step_by(state: Any, c: Any) -> Any:
            options = {"coefficients": c, "steps": steps, "wafer": make_wafer()}
            return wk.stencil(state, wave, radius=1, boundary="periodic", **options)

        return harness.compile_program(step_by, *state())

    def plain() -> harness.CompiledProgram:
        def step(_: Any, state: Any, c: Any) -> Any:
            u = state["u"]
            around = sum(jnp.roll(u, by, axis) for axis in (0, 1) for by in (1, -1))
            return {"u": 2 * u - state["before"] + c * (around - 4 * u), "before": u}

        def step_by(state: Any, c: Any) -> Any:
            return jax.lax.fori_loop(0, steps, functools.partial(step, c=c), state)

        return harness.compile_program(step_by, *state())

    return {_ARRAY: plain, **on_wafers(ours)}


def _seas(size: int, steps: int) -> dict[str, Build]:
    program = example("shallow_water")

    def ours(make_wafer: Callable) -> harness.CompiledProgram:
        def sail(sea: Any, land: Any) -> Any:
            options = {"coefficients": land, "steps": steps, "wafer": make_wafer()}
            return wk.stencil(sea, program.step, radius=2, boundary=program.BOUNDARY, **options)

        return harness.compile_program(sail, program.jet(size, size), program.walls(size, size))

    def plain() -> harness.CompiledProgram:
        def sail(sea: Any, land: Any) -> Any:
            def step(i: Any, sea: Any) -> Any:
                return plain_sea.step(sea, land, program, i == 0)

            return jax.lax.fori_loop(0, steps, step, sea)

        return harness.compile_program(sail, program.jet(size, size), program.walls(size, size))

    return {_ARRAY: plain, **on_wafers(ours)}


def _noise(size: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (size, size))
