"""Whole arrays outside kernels: what reads cells of other tiles moves them, nothing else does."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.estimator import layouts

H, W = 160, 240  # on 8 x 8 PEs: tiles of 20 x 30
GRID = P("y", "x")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def estimate(function, *operands):
    return wk.estimate(function, *operands, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8))


FIELD = array(H, W)


def names(e):
    return {name for name, _, _ in e.by_operation}


def test_a_slice_that_leaves_out_a_rim_is_a_halo():
    """Two rows of the next tile's 20, each 30 words; no rows from the front."""
    e = estimate(lambda u: u[2:] * 2.0, FIELD)
    assert e.received == 2 * 30 and e.words["N"] == 2 * 30 and e.moves == 1
    assert estimate(lambda u: u[:-2] * 2.0, FIELD).moves == 0
    star = lambda u: u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]  # noqa: E731
    assert 2 * (20 + 30) <= estimate(star, FIELD).received <= 4 * (20 + 30)


def test_a_roll_and_a_pad_are_shifts():
    e = estimate(lambda u: jnp.pad(u, ((1, 1), (0, 0))), FIELD)
    assert e.received == 30 and e.words["S"] == 30
    rolled = estimate(lambda u: jnp.roll(u, 3, 1), FIELD)
    assert rolled.words["E"] >= 3 * 20
    # A roll by more than a tile goes as many PEs further.
    assert estimate(lambda u: jnp.roll(u, 60, 1), FIELD).words["E"] >= 60 * 20


@pytest.mark.parametrize(
    "function",
    [
        lambda u: u[::2] * 2.0,
        lambda u: u[: H // 2] * 2.0,
        lambda u: u[::-1] * 2.0,
        lambda u: u + u.reshape(W, H).T,
        lambda u: jnp.concatenate([u, u]),
        lambda u: jnp.sort(u, 0),
        lambda u: jnp.argsort(u.ravel()),
        lambda u: u[jnp.arange(H) % 7],
        lambda u: lax.dynamic_slice_in_dim(u, u[0, 0].astype(int), 40),
        lambda u: lax.top_k(u, 4)[0],
        lambda u: jnp.fft.fft2(u).real,
    ],
    ids="stride half reverse transpose concatenate sort argsort gather dynamic top_k fft".split(),
)
def test_what_goes_far_crosses_the_middle(function):
    e = estimate(function, FIELD)
    assert "relayout" in names(e) and max(e.words.values()) > 0


def test_updates_go_where_they_belong():
    indices = array(500, dtype=jnp.int32)
    for update in (lambda u, i: u.at[i % H].add(1.0), lambda u, i: u.at[i % H, 0].set(0.0)):
        e = estimate(update, FIELD, indices)
        assert "relayout" in names(e)
    e = estimate(lambda u, v: lax.dynamic_update_slice(u, v, (3, 0)), FIELD, array(4, W))
    assert "relayout" in names(e) and e.received <= W


def test_sums_are_reduced_over_the_pes():
    for reduce in (jnp.sum, jnp.max, jnp.mean, jnp.argmax, jnp.linalg.norm):
        assert any(n.startswith("reduce by") for n in names(estimate(reduce, FIELD)))
    along = estimate(lambda u: u.sum(0), FIELD)
    assert along.words["S"] > 0 and "E" not in along.words
    assert any(
        n.startswith("reduce by") for n in names(estimate(lambda u: jnp.cumsum(u, 1), FIELD))
    )
    window = estimate(lambda u: lax.reduce_window(u, 0.0, lax.add, (3, 3), (1, 1), "SAME"), FIELD)
    assert window.received >= 2 * 30 + 2 * 20


@pytest.mark.parametrize(
    "function",
    [
        lambda u, v: jnp.tanh(u) * 2.0 + v,
        lambda u, v: u.T * v.T,
        lambda u, v: u[None, :, :, None] + v[None, :, :, None],
        lambda u, v: jnp.where(u > 0, u, v),
        lambda u, v: u.astype(jnp.float16),
    ],
)
def test_what_stays_in_its_tile_moves_nothing(function):
    e = estimate(function, FIELD, FIELD)
    assert e.moves == 0 and not e.words


def test_a_small_array_lies_on_every_pe():
    e = estimate(lambda v: jnp.sort(jnp.roll(v, 1)[1:]) + v.sum(), array(32))
    assert e.moves == 0


@pytest.mark.parametrize(
    ("old", "spec", "new", "wanted"),
    [
        ((8, 6, 4), (("y",), (), ("x",)), (8, 2, 3, 4), (("y",), (), (), ("x",))),
        ((8, 6, 4), (("y",), (), ()), (48, 4), (("y",), ())),
        ((48, 4), (("y",), ()), (8, 6, 4), (("y",), (), ())),
        ((1, 8, 6), ((), ("y",), ("x",)), (8, 6), (("y",), ("x",))),
        ((8, 6), (("y",), ("x",)), (8, 1, 6, 1), (("y",), (), ("x",), ())),
        ((8, 6, 4), ((), ("y",), ()), (48, 4), None),
        ((8, 8), (("y",), ("x",)), (64,), None),
    ],
)
def test_a_reshape_keeps_what_is_split_in_front(old, spec, new, wanted):
    wafer = wk.Wafer.abstract(wk.WSE3, 2, 2)
    equation = jax.make_jaxpr(lambda x: x.reshape(new))(array(*old)).eqns[0]
    layout = layouts.result_layout(equation, [spec], [False], wafer)
    assert layout.spec == wanted and len(layout.moves) == (wanted is None)


def test_a_kernel_takes_what_is_laid_out_as_it_needs_it():
    wafer = wk.Wafer.abstract(wk.WSE3, 8, 8)
    double = wafer.map(lambda x: x * 2.0, in_specs=GRID, out_specs=GRID)
    assert wk.estimate(lambda u: double(double(u) + 1.0), FIELD, wafer=wafer).moves == 0
    assert wk.estimate(lambda u: double(double(u).T), array(240, 240), wafer=wafer).moves == 1
