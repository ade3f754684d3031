"""Gradients of many steps from few kept states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import wsekern as wk

SHAPE = (16, 16)
INSIDE = (slice(1, -1),) * 2


def field(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def wave(state, c):
    u = state["u"]
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    new = 2 * u[INSIDE] - state["before"][INSIDE] + c[INSIDE] * (around - 4 * u[INSIDE])
    return {"u": new, "before": u[INSIDE]}


def check_a_wave(steps, **options):
    """Its gradients by velocity and field equal those of plain padding."""
    c, u, target = np.full(SHAPE, 0.2, np.float32) + 0.02 * field(), field(seed=1), field(seed=2)

    def plain(c, u):
        def step(state, _):
            padded = {k: jnp.pad(f, 1) for k, f in state.items()}
            return wave(padded, jnp.pad(c, 1, mode="edge")), None

        state, _ = lax.scan(step, {"u": u, "before": u}, length=steps)
        return jnp.sum(state["u"] * target)

    def ours(c, u):
        options_ = {"steps": steps, "coefficients": c, **options}
        state = wk.stencil({"u": u, "before": u}, wave, radius=1, **options_)
        return jnp.sum(state["u"] * target)

    close(*(jax.jit(jax.grad(f, (0, 1)))(c, u) for f in (ours, plain)))


def close(got, want, rtol=1e-4):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("name", ["2x4", "virtual-4x4"])
def test_gradient_of_a_wave(name, wafer_called):
    """21 steps: segments of units, a unit more, and a step."""
    check_a_wave(21, checkpoint="sqrt", wafer=wafer_called(name))


def test_gradient_without_checkpoints(wafer_called):
    check_a_wave(7, depth=2, wafer=wafer_called("2x4"))


def everything(state, held, step):
    """Not linear; in two fields and an integer one; reads split and whole arrays and the step."""
    u, v, k = state["u"], state["v"], held["k"]
    around = (
        k[2:, 1:-1] * u[2:, 1:-1] + k[:-2, 1:-1] * u[:-2, 1:-1] + u[1:-1, :-2] + 0.1 * u[2:, 2:]
    )
    u_new = v[INSIDE] + 0.1 * around * k[INSIDE] + held["forcing"][step] + held["rows"][1:-1]
    return {"n": state["n"][INSIDE] + 1, "u": u_new, "v": u[INSIDE] * jnp.tanh(v[1:-1, 2:])}


def test_gradient_of_everything_a_step_does(wafer_called):
    steps = 9
    shapes = [SHAPE, SHAPE, SHAPE, (16, 1), (steps,), (steps, 2)]
    operands = [0.2 * field(shape, seed) for seed, shape in enumerate(shapes)]

    def loss(u, v, k, rows, forcing, values, **options):
        last, heard = wk.stencil(
            {"n": jnp.zeros(SHAPE, jnp.int32), "u": u, "v": v},
            everything,
            radius=1,
            boundary=[("fixed", lambda near: -near * near), ("reflect", "zero")],
            steps=steps,
            coefficients={"k": k, "rows": rows, "forcing": forcing},
            sources=wk.Sources(at=[(3, 4), (0, 0)], values=values, field="u"),
            receivers=wk.Receivers(at=[(5, 5), (1, 0), (9, 11)], field="v"),
            **options,
        )
        return jnp.sum(jnp.sin(heard)) + jnp.sum(last["u"] * last["v"] * last["n"])

    def gradient(**options):
        return jax.jit(jax.grad(functools.partial(loss, **options), range(6)))(*operands)

    got = gradient(checkpoint="sqrt", depth=2, wafer=wafer_called("2of2x2"))
    close(got, gradient(depth=1))


@pytest.mark.parametrize("grid", ["2x4", "virtual-2x4"])
def test_gradient_of_a_quotient_where_sizes_do_not_divide(grid, wafer_called):
    """Beyond the field an update may divide by zero; no such cell has a part in the gradient."""
    rng = np.random.default_rng(0)
    u, c = (jnp.asarray(rng.uniform(1, 2, (7, 9)), jnp.float32) for _ in range(2))

    def total(u, c, wafer=None):
        def update(v, c):
            return (v[1:-1, 1:-1] + v[2:, 1:-1] + v[1:-1, :-2]) / c[1:-1, 1:-1]

        out = wk.stencil(u, update, radius=1, coefficients=c, steps=2, wafer=wafer)
        return jnp.sin(out).sum()

    run = jax.jit(jax.grad(functools.partial(total, wafer=wafer_called(grid)), (0, 1)))
    for x, y in zip(run(u, c), jax.jit(jax.grad(total, (0, 1)))(u, c), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_few_states_are_kept(as_shipped):
    """100 steps of a wave of two fields, in less than 45 fields; their sum would be 200."""
    c = jax.ShapeDtypeStruct((128, 128), jnp.float32)

    def loss(c, u):
        options = {"steps": 100, "coefficients": c, "checkpoint": "sqrt"}
        return jnp.sum(wk.stencil({"u": u, "before": u}, wave, radius=1, **options)["u"])

    program = jax.jit(jax.grad(loss)).lower(c, c).compile(compiler_options=as_shipped)
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 45 * 128 * 128 * 4
