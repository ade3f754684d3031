"""Every algorithm of a reduction against the plain reduction."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.fabric.reductions.choice import LINES

ALL = P("wafer", "y", "x")
GRID = ("y", "x")
NUMPY: dict[str, Any] = {"sum": np.sum, "max": np.max, "min": np.min, "mean": np.mean}
AXIS = {"wafer": 0, "y": 1, "x": 2}


REDUCTIONS: tuple[Any, ...] = tuple(LINES)


def tiles(wafer, *tile, seed=0):
    """Whole numbers, whose sums are exact in whatever order."""
    shape = (wafer.wafers, wafer.height, wafer.width, *tile)
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)


def over_tiles(wafer, kernel):
    """`kernel` of one PE's tile, as a function of all tiles `[wafer, y, x, *tile]`."""

    def per_pe(u):
        return jax.tree.map(lambda v: v[None, None, None], kernel(u[0, 0, 0]))

    return jax.jit(wafer.map(per_pe, in_specs=ALL, out_specs=ALL))


def plain_all_reduce(u, along, op="sum"):
    axes = tuple(AXIS[a] for a in ([along] if isinstance(along, str) else along))
    return np.broadcast_to(NUMPY[op](u, axes, keepdims=True), u.shape)


def on_root(whole, along, root):
    """`whole` where a PE's number along `along`, row-major, is `root`; zeros elsewhere."""
    number = 0
    for axis in [along] if isinstance(along, str) else along:
        shape = [1] * whole.ndim
        shape[AXIS[axis]] = -1
        size = whole.shape[AXIS[axis]]
        number = number * size + np.arange(size).reshape(shape)
    return np.where(number == root, whole, 0)


@pytest.mark.parametrize("algorithm", [*LINES, "ring", "xla", "auto"])
def test_every_pe_gets_the_reduction(wafer, algorithm):
    """By every operation, along either axis and both; of a word, and of several pieces."""
    u = tiles(wafer, 7)

    def kernel(u):
        sums = [fabric.all_reduce(u, along, algorithm=algorithm) for along in ("x", GRID)]
        ops: list[fabric.Op] = ["max", "min", "mean"]
        others = [fabric.all_reduce(u, "y", op, algorithm=algorithm) for op in ops]
        return [*sums, *others, fabric.all_reduce(u[:1], "x", algorithm=algorithm)]

    want = [
        plain_all_reduce(u, "x"),
        plain_all_reduce(u, GRID),
        *(plain_all_reduce(u, "y", op) for op in NUMPY if op != "sum"),
    ]
    got = over_tiles(wafer, kernel)(u)
    for x, y in zip(got, [*want, plain_all_reduce(u, "x")[..., :1]], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("algorithm", [*LINES, "xla"])
def test_the_root_gets_the_reduction_and_no_other(full_wafer, algorithm):
    u, last = tiles(full_wafer, 3), full_wafer.width - 1

    def kernel(u):
        along_x = [fabric.reduce(u, "x", root, algorithm=algorithm) for root in (0, 1, last)]
        both = fabric.reduce(u, GRID, last + 1, "max", algorithm=algorithm)
        return [*along_x, both, fabric.reduce(u, ("wafer", "y"), 1, algorithm=algorithm)]

    got = over_tiles(full_wafer, kernel)(u)
    want = [on_root(plain_all_reduce(u, "x"), "x", root) for root in (0, 1, last)]
    want.append(on_root(plain_all_reduce(u, GRID, "max"), GRID, last + 1))
    want.append(on_root(plain_all_reduce(u, ("wafer", "y")), ("wafer", "y"), 1))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_snake_reduces_the_whole_grid(full_wafer):
    u, root = tiles(full_wafer, 5), full_wafer.width + 1

    def kernel(u):
        return [
            fabric.all_reduce(u, GRID, algorithm="snake"),
            fabric.all_reduce(u, ("wafer", *GRID), "min", algorithm="snake"),
            fabric.reduce(u, GRID, root, algorithm="snake"),
        ]

    want = [plain_all_reduce(u, GRID), plain_all_reduce(u, ("wafer", *GRID), "min")]
    want.append(on_root(plain_all_reduce(u, GRID), GRID, root))
    jax.tree.map(np.testing.assert_array_equal, over_tiles(full_wafer, kernel)(u), want)


def pulled_back(f):
    """A jitted function of tiles and weights: what `f` makes of them, and a gradient of it."""

    def call(u, w):
        out, pull = jax.vjp(f, u, w)
        return out, pull(
            jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), out)
        )

    return jax.jit(call)


@pulled_back
def plain_sums(u, w):
    squares = u * u
    mean = jnp.broadcast_to(squares.mean((1, 2), keepdims=True), u.shape)
    return w * mean, squares.sum((1, 2)).reshape(-1)


@pytest.mark.parametrize("algorithm", [*LINES, "ring", "snake", "xla"])
def test_gradients_are_those_of_the_plain_sum(full_wafer, algorithm):
    """Of a result that every PE uses in its own way, and of one that leaves the kernel once."""
    u = tiles(full_wafer, 4)
    weights = tiles(full_wafer, 4, seed=1)

    def kernel(u, w):
        u, w = u[0, 0, 0], w[0, 0, 0]
        mean = fabric.all_reduce(u * u, GRID, "mean", algorithm=algorithm)
        whole = fabric.all_reduce(u * u, GRID, algorithm=algorithm)
        return (w * mean)[None, None, None], whole

    run = full_wafer.map(kernel, in_specs=(ALL, ALL), out_specs=(ALL, P("wafer")))
    got, want = (f(u, weights) for f in (pulled_back(run), plain_sums))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def second_and_forward(total):
    """Of the square of `total`: its gradient's sum's gradient, and itself along a direction."""

    def loss(u):
        return (total(u) ** 2).sum()

    return jax.jit(
        lambda u: (
            jax.grad(lambda v: jax.grad(loss)(v).sum())(u),
            jax.jvp(loss, (u,), (jnp.ones_like(u),)),
        )
    )


plain_second_and_forward = second_and_forward(lambda u: (u * u).sum((1, 2)).reshape(-1))


@pytest.mark.parametrize("algorithm", ["chain", "ring", "auto"])
def test_second_derivatives_and_forward_mode_are_those_of_the_plain_sum(full_wafer, algorithm):
    u = tiles(full_wafer, 3)
    run = full_wafer.map(
        lambda u: fabric.all_reduce((u * u)[0, 0, 0], GRID, algorithm=algorithm),
        in_specs=ALL,
        out_specs=P("wafer"),
    )

    got, want = second_and_forward(run)(u), plain_second_and_forward(u)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def test_truths_are_counted_as_xla_counts_them(full_wafer):
    def kernel(u):
        ops: list[fabric.Op] = ["sum", "mean", "max", "min"]
        return [[fabric.all_reduce(u > 0, "x", op, algorithm=a) for op in ops] for a in alike]

    alike: list[Any] = ["xla", "chain", "k_tree", "ring", "auto"]
    want, *others = over_tiles(full_wafer, kernel)(tiles(full_wafer, 5))
    for got in others:
        for x, y in zip(got, want, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("algorithm", ["chain", "k_tree"])
def test_the_gradient_of_a_rooted_sum_floods_back(full_wafer, algorithm):
    u = tiles(full_wafer, 4)

    def total(along, algorithm):
        run = over_tiles(full_wafer, lambda u: fabric.reduce(u * u, along, 1, algorithm=algorithm))
        return jax.jit(jax.grad(lambda u: (run(u) * jnp.arange(4.0).reshape(1, 1, 1, 4)).sum()))

    along: Any
    for along in ("x", GRID):
        np.testing.assert_array_equal(total(along, algorithm)(u), total(along, "xla")(u))


def test_an_extreme_has_no_gradient_on_the_fabric():
    wafer = wk.Wafer.virtual(wk.WSE2, 2, 2)
    run = over_tiles(wafer, lambda u: fabric.all_reduce(u, "x", "max", algorithm="chain"))
    with pytest.raises(ValueError, match="op='max' has no gradient; put lax.stop_gradient"):
        jax.grad(lambda u: run(u).sum())(tiles(wafer, 2))
    still = over_tiles(wafer, lambda u: u + fabric.all_reduce(lax.stop_gradient(u), "x", "max"))
    np.testing.assert_array_equal(jax.grad(lambda u: still(u).sum())(tiles(wafer, 2)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["devices", "virtual"])
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_line_root_and_size(backend, data):
    """Lines of any length, where the backend has the PEs."""
    if backend == "devices":
        wafer = wk.Wafer.devices(1, data.draw(st.integers(1, 7), label="PEs"))
    else:
        wafer = wk.Wafer.virtual(wk.WSE2, 1, data.draw(st.integers(1, 23), label="PEs"))
    root = data.draw(st.integers(0, wafer.width - 1), label="root")
    u = tiles(wafer, data.draw(st.integers(1, 40), label="words"))

    def kernel(u):
        return [fabric.reduce(u, "x", root, algorithm=name) for name in REDUCTIONS]

    for got in over_tiles(wafer, kernel)(u):
        np.testing.assert_array_equal(got, on_root(plain_all_reduce(u, "x"), "x", root))


def test_whole_numbers_and_infinities_come_through(full_wafer):
    def kernel(u):
        sums = [fabric.all_reduce(u.astype(jnp.int8), "x", algorithm=a) for a in REDUCTIONS]
        large = jnp.where(u > 0, jnp.inf, u)
        return [*sums, *(fabric.all_reduce(large, "x", "max", algorithm=a) for a in REDUCTIONS)]

    u = tiles(full_wafer, 3)
    got = over_tiles(full_wafer, kernel)(u)
    for x in got[: len(LINES)]:
        assert x.dtype == jnp.int8
        np.testing.assert_array_equal(x, plain_all_reduce(u, "x"))
    for x in got[len(LINES) :]:
        np.testing.assert_array_equal(x, plain_all_reduce(np.where(u > 0, np.inf, u), "x", "max"))


def distances_sent(wafer, algorithm, words=64):
    """How far each move of an all-reduce along x sends: a set of distances."""
    run = wafer.map(
        lambda u: fabric.all_reduce(u, "x", algorithm=algorithm), in_specs=ALL, out_specs=ALL
    )
    text = str(jax.make_jaxpr(run)(jax.ShapeDtypeStruct((1, 1, 16 * words), jnp.float32)))
    perms = [p for p in text.split("perm=(")[1:]]
    pairs = [eval(f"({p.partition('))')[0]}),)") for p in perms]
    return {abs(a - b) for pair in pairs for a, b in pair}


@pytest.mark.parametrize(
    ("algorithm", "distances"),
    [
        ("star", {1}),
        ("chain", {1}),
        ("tree", {1, 2, 4, 8}),
        ("two_phase", {1, 4}),
        ("k_tree", {1, 4}),
        ("ring", {1, 2}),
    ],
)
def test_how_far_a_move_goes(algorithm, distances):
    assert distances_sent(wk.Wafer.abstract(wk.WSE2, 1, 16), algorithm) == distances


def test_a_transposed_grid_has_every_tile_in_its_mirror_place():
    for wafer in (
        wk.Wafer.devices(3, 3),
        wk.Wafer.devices(2, 2, 2),
        wk.Wafer.virtual(wk.WSE2, 5, 5),
    ):
        u = tiles(wafer, 2)
        np.testing.assert_array_equal(over_tiles(wafer, fabric.transpose)(u), u.swapaxes(1, 2))


def test_a_root_deals_its_tile_out_and_collects_all(full_wafer):
    u = tiles(full_wafer, 8)

    def kernel(u):
        return fabric.scatter(u, "x", 0, root=1), fabric.gather(u, "y", 0, root=1)

    scattered, collected = over_tiles(full_wafer, kernel)(u)
    parts = np.stack(np.split(u[:, :, 1], full_wafer.width, -1), 2)
    np.testing.assert_array_equal(scattered, parts)
    whole = np.moveaxis(u, 1, -2).reshape(*u.shape[:1], *u.shape[2:-1], -1)
    np.testing.assert_array_equal(collected[:, 1], whole)
    np.testing.assert_array_equal(np.delete(collected, 1, 1), 0)


NONE: Any = "butterfly"
REFUSALS: dict[str, tuple[Any, str]] = {
    "unknown": (lambda u: fabric.all_reduce(u, "x", algorithm=NONE), r"not one of \['auto'"),
    "snake on a line": (
        lambda u: fabric.reduce(u, "x", algorithm="snake"),
        "the two axes of the grid, it was given 1; use 'chain'",
    ),
    "ring to a root": (lambda u: fabric.reduce(u, "x", algorithm="ring"), "'ring' has no root"),
    "root": (lambda u: fabric.reduce(u, GRID, 8), "root=8 is outside 0 to 7"),
    "root of scatter": (
        lambda u: fabric.scatter(u, "x", 0, 4),
        "scatter: root=4 is outside 0 to 3",
    ),
    "root of gather": (lambda u: fabric.gather(u, "y", 0, -1), "gather: root=-1 is outside 0 to 1"),
    "transpose": (lambda u: fabric.transpose(u), "the grid is 2x4, it must be square"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    kernel, message = REFUSALS[name]
    wafer = wk.Wafer.abstract(wk.WSE2, 2, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(over_tiles(wafer, kernel), tiles(wafer, 8))
