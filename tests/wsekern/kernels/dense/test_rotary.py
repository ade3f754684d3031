"""Rotary positions against multiplication of complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk

DIVIDES, PADDED = (2, 8, 4, 8), (3, 5, 3, 6)  # B T N H
POSITIONS = {
    "by default": None,
    "one for all sequences": np.array([7, 0, 3, 3, 1000], np.int32),
    "of each sequence": np.arange(15, dtype=np.int32).reshape(3, 5)[:, ::-1],
}
each_position = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)


def queries(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain(x, positions=None, theta=10_000.0, frequencies=None):
    """Pairs of features are complex numbers, and turn by multiplication; in float64."""
    T, half = x.shape[1], x.shape[3] // 2
    frequencies = theta ** (-np.arange(half) / half) if frequencies is None else frequencies
    positions = np.arange(T) if positions is None else positions
    turns = np.exp(1j * np.multiply.outer(np.broadcast_to(positions, x.shape[:2]), frequencies))
    turned = (x[..., :half] + 1j * x[..., half:]) * turns[:, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def turn(**options):
    return jax.jit(functools.partial(wk.rotary, **options))


@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_rotation(wafer, shape):
    x = queries(shape)
    with wafer:
        y = turn()(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, plain(x), atol=2e-6)
    np.testing.assert_array_equal(turn(wafer=wafer)(x), y)


@each_position
def test_positions_say_how_far(positions):
    x = queries(PADDED)
    y = turn(theta=100.0)(x, positions)
    np.testing.assert_allclose(y, plain(x, positions, theta=100.0), atol=3e-4)


def test_bfloat16_is_computed_in_float32():
    """Neither a position like 1001 nor its angle is exact in bfloat16."""
    x, positions = queries(PADDED).astype(jnp.bfloat16), np.arange(1001, 1006, dtype=np.int32)
    y = turn()(x, positions)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), plain(np.float32(x), positions), atol=2**-7)


def test_frequencies_may_be_given():
    x, frequencies = queries(PADDED), np.array([0.5, 0.0, 2.0], np.float32)
    y = turn()(x, frequencies=frequencies)
    np.testing.assert_allclose(y, plain(x, frequencies=frequencies), atol=2e-6)
    np.testing.assert_array_equal(y[..., [1, 4]], x[..., [1, 4]])


@each_position
def test_lengths_stay(positions):
    x = queries(PADDED)
    y = turn()(x, positions)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_the_first_position_turns_nothing():
    x = queries(DIVIDES)
    np.testing.assert_array_equal(turn()(x)[:, 0], x[:, 0])


def test_scores_depend_on_distance_alone():
    q, k = queries((1, 1, 1, 8)), queries((1, 1, 1, 8), seed=1)
    q, k = (np.tile(x, (1, 6, 1, 1)) for x in (q, k))
    positions = np.arange(6, dtype=np.int32)

    @jax.jit
    def scores(q, k, offset):
        q, k = (wk.rotary(x, positions + offset) for x in (q, k))
        return jnp.einsum("btnh,bsnh->ts", q, k)

    near, far = np.asarray(scores(q, k, 0)), np.asarray(scores(q, k, 90))
    np.testing.assert_allclose(near, far, atol=1e-4)
    for distance in range(-5, 6):
        diagonal = np.diagonal(near, distance)
        np.testing.assert_allclose(diagonal, np.full_like(diagonal, diagonal[0]), atol=1e-5)


@each_position
def test_gradient_turns_back(positions):
    x, dy = queries(PADDED), queries(PADDED, seed=1)

    @jax.jit
    def gradient(x, dy, positions):
        return jax.vjp(lambda x: wk.rotary(x, positions), x)[1](dy)[0]

    back = -(np.arange(5) if positions is None else positions)
    np.testing.assert_allclose(gradient(x, dy, positions), plain(dy, back), atol=2e-4)


def test_gradient_of_the_frequencies():
    x, dy, frequencies = queries(PADDED), queries(PADDED, 1), np.array([0.5, 0.1, 2], np.float32)

    @jax.jit
    def loss(frequencies, x):
        return jnp.sum(wk.rotary(x, frequencies=frequencies) * dy)

    gradient = jax.jit(jax.grad(loss))(frequencies, x)
    for i in range(3):
        step = 1e-4 * np.eye(3)[i]
        ahead, behind = (plain(x, frequencies=frequencies + s) for s in (step, -step))
        np.testing.assert_allclose(gradient[i], np.sum((ahead - behind) * dy) / 2e-4, rtol=1e-4)


def test_forward_mode_turns_tangents_alike():
    x, dx = queries(PADDED), queries(PADDED, seed=1)
    _, dy = jax.jit(lambda x, dx: jax.jvp(wk.rotary, (x,), (dx,)))(x, dx)
    np.testing.assert_allclose(dy, plain(dx), atol=2e-6)


def test_nothing_is_sent(as_shipped):
    wafer = wk.Wafer.devices(2, 4)
    heads = wafer.sharding(P("wafer", "y", "x", None))
    x = jax.ShapeDtypeStruct(DIVIDES, jnp.float32, sharding=heads)
    compiled = turn(wafer=wafer).lower(x).compile(compiler_options=as_shipped)
    assert compiled.output_shardings.is_equivalent_to(heads, 4)
    program = compiled.as_text()
    for move in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert move not in program


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ((5, 3, 6), {}, r"x is \(5, 3, 6\), it must have four dimensions"),
        ((2, 5, 3, 7), {}, r"its head size \(7\) must be even"),
        ((2, 5, 3, 6), {"positions": jnp.arange(4)}, r"positions is \(4,\) .* \(5,\) or \(2, 5\)"),
        ((2, 5, 3, 6), {"positions": jnp.zeros((1, 5), int)}, r"positions is \(1, 5\)"),
        ((2, 5, 3, 6), {"positions": jnp.arange(5.0)}, "float32; cast it to an integer dtype"),
        ((2, 5, 3, 6), {"frequencies": jnp.ones(6)}, r"frequencies is \(6,\) .* must be \(3,\)"),
    ],
)
def test_refuses_what_does_not_fit(x, options, message):
    with pytest.raises(ValueError, match=f"^rotary: .*{message}"):
        wk.rotary(jnp.ones(x), **options)


@pytest.mark.refuses
def test_refuses_whole_numbers():
    with pytest.raises(ValueError, match="x is int32; cast it to a floating dtype"):
        wk.rotary(jnp.ones((1, 3, 1, 2), jnp.int32))
