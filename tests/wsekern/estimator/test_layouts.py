"""Whole arrays outside kernels: what reads cells of other tiles moves them, nothing else does."""

import jax
import jax.numpy as jnp
import pytest
from estimating import array
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.estimator import layouts, specs

H, W = 160, 240  # on 8 x 8 PEs: tiles of 20 x 30
GRID = P("y", "x")
SUMMED = "scatter-add as a sum over the PEs"


def estimate(function, *operands):
    return wk.estimate(function, *operands, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8))


FIELD = array(H, W)


def names(e):
    return {name for name, _, _ in e.by_operation}


@pytest.mark.parametrize("grid", [(1, 1), (1, 2)], ids=str)
def test_one_pe_has_all_of_every_array(grid):
    """No words move where there is nobody to send them to, numbers that are no arrays included."""

    def program(u):
        u = jnp.sort(u[1:, :-1] + u[:-1, 1:], 0)
        grow = lambda s: (s[0] + s[1][0, 0], s[1])  # noqa: E731
        return lax.while_loop(lambda s: s[0] < s[1].sum(), grow, (0.0, u))

    wafer = wk.Wafer.abstract(wk.WSE3, *grid)
    e = wk.estimate(program, FIELD, wafer=wafer, trips=3)
    assert e.cycles > 0 and (e.moves > 0) == (wafer.size > 1)
    shift = lambda u: wk.fabric.shift(u, "y", 1, periodic=False)  # noqa: E731
    alone = wafer.map(shift, in_specs=GRID, out_specs=GRID)
    e = wk.estimate(lambda u: alone(u) * 2.0, FIELD, wafer=wafer)
    assert not e.unknown and not e.received and {name for name, _, _ in e.by_operation} == {"mul"}


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
        lambda u: jnp.fft.fft2(u).real,
        lambda u: u.T + 1.0,
        lambda u: jnp.tile(u, (2, 1)),
        lambda u: u.reshape(H // 2, 2 * W) * 2.0,
        lambda u: u.ravel() * 2.0,
    ],
    ids=(
        "stride half reverse symmetric concatenate sort argsort gather dynamic fft transpose tile "
        "reshape ravel"
    ).split(),
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
        lambda u, v: (u.T * v.T).T,
        lambda u, v: (u.ravel() * v.ravel()).reshape(H, W),
        lambda u, v: jnp.repeat(u, 2, 0) * 2.0,
        lambda u, v: u * 2.0 + jnp.arange(W)[None],
        lambda u, v: u[None, :, :, None] + v[None, :, :, None],
        lambda u, v: jnp.where(u > 0, u, v),
        lambda u, v: u.astype(jnp.float16),
    ],
)
def test_what_stays_in_its_tile_moves_nothing(function):
    e = estimate(function, FIELD, FIELD)
    assert e.moves == 0 and not e.words


def test_a_reduction_of_ones_own_costs_what_a_sum_does():
    join = lambda a, b: jnp.hypot(a, b)  # noqa: E731
    own = estimate(lambda u: lax.reduce(u, jnp.float32(0), join, (0,)), FIELD)
    assert own.words == estimate(lambda u: u.sum(0), FIELD).words and own.cycles > 20 * 30
    window = estimate(
        lambda u: lax.reduce_window(u, jnp.float32(0), join, (3, 3), (1, 1), "SAME"), FIELD
    )
    assert window.received >= 2 * 30 + 2 * 20 and window.cycles > 9 * 20 * 30


def test_wafers_share_what_was_assumed():
    two, one = (
        wk.estimate(lambda u: u.T * 2.0, FIELD, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8, n))
        for n in (2, 1)
    )
    assert dict((n, c) for n, _, c in two.by_operation)["mul"] < 320 < 600
    assert dict((n, c) for n, _, c in one.by_operation)["mul"] > 600


@pytest.mark.parametrize("n", [20, 60, 8 * 8 + 1])
@pytest.mark.parametrize("reduce", [jnp.sum, jnp.max, jax.nn.softmax, jnp.argmax, jnp.cumsum])
def test_few_elements_lie_on_few_pes(reduce, n):
    """One on a PE, in rows: a sum crosses as many hops as there are PEs in a row, and back."""
    e = estimate(reduce, array(n))
    assert any(name.startswith("reduce by") for name in names(e))
    assert e.cycles > 2 * (min(n, 8) - 1) + n // 8 - 1


def test_a_handful_of_numbers_lies_on_every_pe():
    e = estimate(lambda v: jnp.sort(jnp.roll(v, 1)[1:]) + v.sum(), array(10))
    assert e.moves == 0 and e.cycles > 10


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 24), (("y",), ("x",))),
        ((3, 16, 24), ((), ("y",), ("x",))),
        ((1000, 2), (("y", "x"), ())),
        ((7, 2, 7), (("y",), (), ("x",))),
        ((40,), (("y", "x"),)),
        ((4, 4), ((), ())),
    ],
)
def test_an_array_is_assumed_to_be_tiled(shape, spec):
    assert specs.assumed_spec(shape, wk.Wafer.abstract(wk.WSE3, 8, 8)) == spec


def test_what_is_reshaped_twice_moves_once_and_only_as_it_must():
    moves = lambda function: estimate(function, FIELD).moves  # noqa: E731
    both = lambda u: (u.ravel() * 2.0, jnp.roll(u.ravel(), 1))  # noqa: E731
    assert "relayout" in names(estimate(both, FIELD))
    assert moves(lambda u: u.ravel().max()) == moves(lambda u: u.max())
    assert moves(lambda u: jnp.vdot(u, u)) == 1  # the sum
    flat = estimate(lambda u: u.ravel()[:300] * 2.0, FIELD)
    assert 0 < flat.received < 20  # not the whole array
    twice = estimate(lambda u: (lambda v: (v[1:] * 2.0, v[2:] * 2.0))(u.ravel()), FIELD)
    assert twice.received < 1.1 * H * W / 64 + 4


@pytest.mark.parametrize(
    ("function", "program"),
    [
        (lambda u, i: u.ravel()[i], "gather as requests and answers"),
        (lambda u, i: u.ravel()[:100][i], "gather as a flood of its table"),
        (lambda u, i: jax.ops.segment_sum(u.ravel()[: i.size], i, 32), SUMMED),
        (lambda u, i: jnp.bincount(i, length=100), SUMMED),
        (lambda u, i: u.ravel().at[i].set(1.0), "scatter as updates sent to their places"),
    ],
    ids=["gather", "table", "segment_sum", "bincount", "set"],
)  # fmt: skip
def test_what_data_address_is_moved_and_named(function, program):
    e = estimate(function, FIELD, array(20_000, dtype=jnp.int32))
    assert program in e.assumed and "test_layouts.py:" in e.assumed[program]
    assert e.received > 0 and max(e.words.values()) > 0


def test_a_row_beside_a_field_is_flooded():
    e = estimate(lambda u, v: u * v[None], FIELD, array(W))
    assert e.received == W // 8 and list(e.assumed) == ["mul as a flood of its smaller operand"]
    mean = estimate(lambda u: u - u.mean(0, keepdims=True), FIELD)
    assert "flood" not in names(mean)  # every PE has the mean of its columns


def test_what_a_program_returns_is_written():
    """Not only described in another way, as within a program."""
    for view in (lambda u: jnp.repeat(u, 2, 0), lambda u: u.T, lambda u: u[None]):
        assert estimate(view, FIELD).cycles > H * W / 64


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


def test_who_has_a_tile_already_is_sent_none():
    """From P(None, "x") every PE cuts its tile out of what it has; to it, columns gather theirs."""
    wafer = wk.Wafer.abstract(wk.WSE3, 8, 8)
    tiled, columns, whole = (
        wafer.map(lambda x: x * 2.0, in_specs=spec, out_specs=spec)
        for spec in (GRID, P(None, "x"), P(None, None))
    )
    both = lambda first, then: wk.estimate(lambda u: then(first(u)), FIELD, wafer=wafer)  # noqa: E731
    assert both(columns, tiled).moves == both(whole, tiled).moves == both(whole, columns).moves == 0
    assert both(tiled, columns).received == H * W / 8
    assert both(tiled, whole).received == H * W


def test_what_several_pes_have_each_of_them_works_through():
    wafer = wk.Wafer.abstract(wk.WSE3, 8, 8)
    for spec, parts in ((GRID, 64), (P(None, "x"), 8), (P(None, None), 1)):
        made = wafer.map(lambda x: x, in_specs=spec, out_specs=spec)
        e = wk.estimate(lambda u, made=made: made(u) * 2.0, FIELD, wafer=wafer)
        assert H * W / parts < e.cycles < H * W / parts + 20
