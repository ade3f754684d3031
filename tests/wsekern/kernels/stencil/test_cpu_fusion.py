"""Shared values of an update are computed once on CPUs, and results and gradients stay the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from wsekern.kernels.stencil import cpu_fusion

INSIDE = (slice(2, -2),) * 2


def smoothed(u):
    """A stencil of a stencil: the slope is read at four places, and costs a square root."""
    slope = jnp.sqrt(1 + (u[1:] - u[:-1])[:, 1:] ** 2 + (u[:, 1:] - u[:, :-1])[1:] ** 2)
    flow = slope[1:, 1:] + slope[:-1, 1:] - slope[1:, :-1] - 0.5 * slope[:-1, :-1]
    return u[INSIDE] + 0.01 * flow[1:-1, 1:-1]


def five_points(u):
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    return u[1:-1, 1:-1] + 0.2 * (around - 4 * u[1:-1, 1:-1])


def field(shape=(16, 24)):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def shared_shapes(function, *operands):
    jaxpr = jax.make_jaxpr(function)(*operands).jaxpr
    return [[v.aval.shape for v in level] for level in cpu_fusion.shared_levels(jaxpr)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda u: [smoothed(u)], [[(15, 23)]]),
        (lambda u: [five_points(u)], []),
        # Read at two places, but cheaper computed twice.
        (lambda u: [(2 * u)[1:] - (2 * u)[:-1]], []),
        # A shared array that is computed from another one comes a level later.
        (lambda u: [smoothed(jnp.exp(u))], [[(16, 24)], [(15, 23)]]),
        # One row of numbers is not worth a pass, whatever it costs.
        (lambda u: [u[1:] * jnp.exp(u[:1, :]) + u[:-1] * jnp.exp(u[:1, :])], []),
        # Read once, as a whole, by a sum.
        (lambda u: [u * jnp.exp(u).sum()], []),
    ],
)
def test_shares_what_costs_more_if_it_is_computed_again(function, shapes):
    assert shared_shapes(function, field()) == shapes


@pytest.mark.parametrize("step", [3, jnp.int32(3)])
def test_computes_what_the_function_does(step):
    def function(u, n):
        return [smoothed(jnp.exp(u)), jnp.where(n > 0, u, -u), n[1:] + n[:-1]]

    u, n = field(), jnp.arange(16 * 24).reshape(16, 24) - 100
    got = jax.jit(functools.partial(cpu_fusion.compute_once, function))(step, u, n)
    for one, other in zip(got, jax.jit(function)(u, n), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_mask_is_not_shared():
    """What it is computed from is shared; a mask is not, because it cannot be negated."""

    def masked(u):
        hot = jnp.exp(u) > 1
        return [u[1:-1] * hot[1:-1] + u[2:] * hot[2:] - u[:-2] * hot[:-2]]

    got = jax.jit(functools.partial(cpu_fusion.compute_once, masked))(jnp.int32(1), field())
    np.testing.assert_allclose(got[0], masked(field())[0], rtol=1e-6)


def test_an_update_may_print(capsys):
    def printing(u):
        jax.debug.print("mean {m}", m=u.mean())
        return smoothed(u)

    jax.block_until_ready(wk.stencil(field(), printing, radius=2, steps=4))
    jax.effects_barrier()
    assert capsys.readouterr().out.count("mean") == 4


def plain(u, steps):
    for _ in range(steps):
        u = smoothed(jnp.pad(u, 2, "edge"))
    return u


def take_steps(u, steps=6, **options):
    return wk.stencil(u, smoothed, radius=2, boundary="edge", steps=steps, **options)


def test_steps_and_gradients_are_those_of_whole_arrays(full_wafer):
    def energy(u, step):
        return jnp.sum(step(u) ** 2)

    ours = functools.partial(take_steps, wafer=full_wafer)
    want = jax.jit(jax.value_and_grad(functools.partial(energy, step=lambda u: plain(u, 6))))
    for checkpoint in (None, "sqrt"):
        step = functools.partial(ours, checkpoint=checkpoint)
        got = jax.jit(jax.value_and_grad(functools.partial(energy, step=step)))(field())
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5),
            got,
            want(field()),
        )


def test_under_vmap_and_in_forward_mode():
    u = field((3, 12, 12))
    got = jax.jit(jax.vmap(take_steps))(u)
    np.testing.assert_allclose(got[1], plain(u[1], 6), rtol=1e-5, atol=1e-5)
    derivative = jax.jit(lambda u, v: jax.jvp(take_steps, (u,), (v,))[1])(u[0], u[1])
    _, want = jax.jvp(lambda u: plain(u, 6), (u[0],), (u[1],))
    np.testing.assert_allclose(derivative, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["edge", "reflect", "symmetric", "periodic", "zero"])
def test_no_boundary_copies_a_field(rule, as_shipped):
    def go(u):
        return wk.stencil([u, u + 1], crossed, radius=1, boundary=rule, steps=64)

    program = jax.jit(go).lower(field((64, 96))).compile(compiler_options=as_shipped).as_text()
    assert program is not None
    loops = [part for part in program.split("\n\n") if not part.lstrip().startswith("ENTRY")]
    assert " while(" in program
    assert not re.findall(r"= f32\[66,98\]\S* copy\(", "".join(loops))


def crossed(fields):
    return [five_points(fields[1]), five_points(fields[0])]
