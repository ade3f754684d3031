"""The jaxpr of an update for smaller windows, against the update traced for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsekern.kernels.stencil.narrow import narrow

LARGE, SMALL = (12, 11), (9, 7)  # windows


def star(u):
    return u[1:-1, 1:-1] + 0.1 * (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2])


def flux_of_a_flux(u):
    flux = jnp.sqrt(jnp.abs(u[1:, 1:-1] - u[:-1, 1:-1]) + 1)
    return flux[1:] - flux[:-1] + jnp.minimum(flux[1:], 2.0)


def rolled(u):
    return (jnp.roll(u, 1, 0) + jnp.roll(u, -1, 1) * jnp.roll(u, (1, 1), (0, 1)))[1:-1, 1:-1]


def masked(u):
    inside = u[1:-1, 1:-1]
    return jnp.where(inside > 0, jnp.zeros_like(inside), inside).astype(jnp.bfloat16)


def of_a_row(u):
    """Reads a row that stands for all, as a coefficient of size 1 along y does."""
    row = jnp.cumsum(jnp.arange(3.0))[1:2, None]
    return u[1:-1, 1:-1] * row + jax.nn.relu(jnp.float32(2)) + jnp.broadcast_to(row, (1, 1))


def force(u):
    """A gradient, which pads, of an energy of neighbors."""
    return jax.grad(lambda v: ((v[1:] - v[:-1]) ** 2).sum() + (v[:, 1:] * v[:, :-1]).sum())(u)[
        1:-1, 1:-1
    ]


def stacked(u):
    shifted = jnp.stack([u[2:, 1:-1], u[:-2, 1:-1], u[1:-1, 2:].T.T])
    return shifted.sum(0) + shifted.max(0) - shifted[1]


def with_a_far_pad(u):
    """Reads cells of which all, or none, are padding."""
    return jnp.pad(u[1:-1, 1:-1], ((0, 9), (9, 0)), constant_values=3)[:-9, :-9]


def with_all_cells(u):
    return u[1:-1, 1:-1] - u.mean()


def with_numbered_cells(u):
    return u[1:-1, 1:-1] + jnp.arange(u.shape[1] - 2.0)[None]


def with_a_convolution(u):
    return jax.scipy.signal.convolve2d(u, jnp.ones((3, 3)), mode="valid")


def printing(u):
    jax.debug.print("{}", u[0, 0])
    return star(u)


def small_window(window):
    return window[: SMALL[0], : SMALL[1]]


def narrowed(update):
    window = jax.random.normal(jax.random.key(0), LARGE)
    smaller = small_window(window)
    shape = (SMALL[0] - 2, SMALL[1] - 2)
    closed = jax.make_jaxpr(update)(window)
    return narrow(closed, [jax.typeof(smaller)], [shape]), smaller


@pytest.mark.parametrize(
    "update",
    [star, jax.jit(star), jax.jit(flux_of_a_flux), flux_of_a_flux, rolled, masked, of_a_row]
    + [with_numbered_cells, force, stacked, with_a_far_pad],
)
def test_equals_the_update_traced_for_the_smaller_window(update):
    closed, window = narrowed(update)
    # Both in a jit: XLA rounds a product and a sum once if it makes one operation of them.
    [got] = jax.jit(jax.extend.core.jaxpr_as_fun(closed))(window)
    want = jax.jit(update)(window)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype


@pytest.mark.parametrize("update", [with_all_cells, with_a_convolution, printing])
def test_gives_none_where_more_is_read_or_printed(update):
    assert narrowed(update)[0] is None


def test_computes_no_more_cells_than_the_smaller_window_has():
    closed, _ = narrowed(flux_of_a_flux)
    sizes = [variable.aval.size for e in closed.eqns for variable in e.outvars]
    assert max(sizes) <= np.prod(SMALL)


def test_several_fields_and_a_coefficient_keep_their_order():
    def update(u, k, step):
        a, b = u
        return b[1:-1] * k[1:-1] + step, a[1:-1] - k[0]

    windows = [jnp.arange(8.0), jnp.arange(8.0) ** 2]
    smaller = [jnp.arange(5.0), jnp.arange(5.0) ** 2]
    k, step = jnp.linspace(0.0, 1.0, 8), jnp.int32(3)
    closed = jax.make_jaxpr(update)(windows, k, step)
    operands = [*smaller, k[:5], step]
    got = narrow(closed, [jax.typeof(x) for x in operands], [(3,), (3,)])
    want = update(smaller, k[:5], step)
    jax.tree.map(
        np.testing.assert_array_equal, jax.extend.core.jaxpr_as_fun(got)(*operands), [*want]
    )
