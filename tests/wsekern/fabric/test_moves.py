"""The fabric's moves and collectives against NumPy indexing, and their gradients."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.fabric import moves

ALL = P("wafer", "y", "x")
TILE = (1, 16, 4)
GRID = ("y", "x")
EVERY = ("wafer", "y", "x")
DIM = {"wafer": 0, "y": 1, "x": 2}  # of an array of tiles, [wafer, y, x, *tile]
# The folded order of a line of so many PEs, drawn by hand: out on even places, back on odd ones.
FOLDED = {2: [0, 1], 3: [0, 2, 1], 4: [0, 2, 3, 1], 5: [0, 2, 4, 3, 1]}


def tiles_of(whole, wafer):
    n, h, w = wafer.wafers, wafer.height, wafer.width
    a, b, c = whole.shape
    return whole.reshape(n, a // n, h, b // h, w, c // w).transpose(0, 2, 4, 1, 3, 5)


def whole_of(tiles):
    n, h, w, a, b, c = tiles.shape
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(n * a, h * b, w * c)


def per_line(tiles, along, new_line):
    """`tiles` with each line of PEs along `along` replaced by what `new_line` makes of it."""
    dims = [DIM[axis] for axis in ([along] if isinstance(along, str) else along)]
    front = jnp.moveaxis(tiles, dims, range(len(dims)))
    sizes, rest = front.shape[: len(dims)], front.shape[len(dims) :]
    new = jnp.stack(new_line(front.reshape(-1, *rest)))
    return jnp.moveaxis(new.reshape(*sizes, *new.shape[1:]), range(len(dims)), dims)


def take(tiles, along, sources, fill=0.0):
    """Place i along `along` gets the tile of place `sources(i)`, or `fill` where there is none."""

    def new_line(line):
        places = [sources(i) for i in range(len(line))]
        return [line[s] if s in range(len(line)) else jnp.full_like(line[0], fill) for s in places]

    return per_line(tiles, along, new_line)


def operand(wafer, spec=ALL):
    tiles = (wafer.wafers, wafer.height, wafer.width) if spec == ALL else (1, 1, 1)
    shape = [n * t for n, t in zip(tiles, TILE, strict=True)]
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(f, u):
    results, pull = jax.vjp(f, u)
    weights = [(jnp.arange(r.size, dtype=r.dtype) % 7 - 3).reshape(r.shape) for r in results]
    return results, pull(weights)


def check(wafer, kernel, plain, spec=ALL):
    """`kernel` is `plain`, a function of all tiles at once, in its results and their gradient."""
    whole = (wafer.wafers, wafer.height, wafer.width, *TILE)

    def of_tiles(u):
        tiles = tiles_of(u, wafer) if spec == ALL else jnp.broadcast_to(u[None, None, None], whole)
        return [whole_of(new) for new in plain(tiles)]

    run = wafer.map(kernel, in_specs=spec, out_specs=ALL)
    got, want = (with_gradient(f, operand(wafer, spec)) for f in (run, of_tiles))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def transposed_mesh():
    """A wafer whose mesh counts columns first."""
    mesh = jax.make_mesh((5, 3), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices()[:15])
    return wk.Wafer.of(mesh, y="b", x="a")


@pytest.fixture(params=["devices", "transposed", "virtual"])
def odd_wafer(request):
    """A grid whose sides are odd and have no common divisor."""
    if request.param == "virtual":
        return wk.Wafer.virtual(wk.WSE2, 3, 5)
    return transposed_mesh() if request.param == "transposed" else wk.Wafer.devices(3, 5)


def test_a_periodic_shift_rolls_the_tiles(full_wafer):
    moves = [("wafer", 1), ("y", 1), ("x", 1), ("x", -1), ("x", 9), ("y", 0)]
    check(
        full_wafer,
        lambda u: [fabric.shift(u, axis, by) for axis, by in moves],
        lambda t: [jnp.roll(t, by, DIM[axis]) for axis, by in moves],
    )


def test_an_open_shift_lets_fill_in_and_the_edge_out(full_wafer):
    moves = [("y", 1, 0), ("x", -1, 7), ("x", 9, -np.inf), ("x", -9, 0), ("wafer", 1, 2)]

    def kernel(u):
        return [fabric.shift(u, axis, by, periodic=False, fill=fill) for axis, by, fill in moves]

    def plain(t):
        return [take(t, axis, lambda i, by=by: i - by, fill) for axis, by, fill in moves]

    check(full_wafer, kernel, plain)


def test_a_folded_ring_joins_neighbors_at_most_two_hops_apart(odd_wafer):
    moves = [("x", 1), ("x", -2), ("y", 4)]

    def kernel(u):
        return [fabric.shift(u, axis, by, ring="folded") for axis, by in moves]

    def plain_shift(t, axis, by):
        order = FOLDED[t.shape[DIM[axis]]]
        return take(t, axis, lambda i: order[(order.index(i) - by) % len(order)])

    check(odd_wafer, kernel, lambda t: [plain_shift(t, axis, by) for axis, by in moves])
    assert all(abs(a - b) <= 2 for line in FOLDED.values() for a, b in itertools.pairwise(line))


def test_a_pe_knows_its_place_in_a_ring(odd_wafer):
    rings: list[tuple[str, fabric.Ring]] = [("x", "plain"), ("x", "folded"), ("y", "folded")]

    def kernel():
        return [fabric.ring_index(axis, ring)[None, None] for axis, ring in rings]

    plain, east, south = odd_wafer.map(kernel, in_specs=(), out_specs=P("y", "x"))()
    np.testing.assert_array_equal(plain, [[0, 1, 2, 3, 4]] * 3)
    np.testing.assert_array_equal(east, [[0, 4, 1, 3, 2]] * 3)
    np.testing.assert_array_equal(south, np.transpose([[0, 2, 1]] * 5))


def plain_skew(t, along, by, times, plus, ring):
    size, others = t.shape[DIM[along]], t.shape[DIM[by]]
    order, rows = (FOLDED[n] if ring == "folded" else range(n) for n in (size, others))
    source = np.zeros((others, size), int)
    for j, row in enumerate(rows):
        for i, place in enumerate(order):
            source[row, order[(i + times * j + plus) % size]] = place
    front = jnp.moveaxis(t, (DIM[by], DIM[along]), (0, 1))
    return jnp.moveaxis(front[np.arange(others)[:, None], source], (0, 1), (DIM[by], DIM[along]))


def check_skews(wafer, moves):
    def kernel(u):
        return [fabric.skew(u, a, b, times=n, plus=m, ring=ring) for a, b, n, m, ring in moves]

    check(wafer, kernel, lambda t: [plain_skew(t, *move) for move in moves])


SKEWS = (
    ("x", "y", 1, 0, "plain"),
    ("y", "x", -1, 0, "plain"),
    ("x", "y", -2, 3, "folded"),
    ("y", "x", 2, -1, "folded"),
)


def test_a_skew_moves_each_row_by_its_own_index(odd_wafer):
    check_skews(odd_wafer, SKEWS)


def test_a_skew_by_binary_digits_is_the_same(monkeypatch):
    """On devices too, where a grid has more PEs than one permutation may list."""
    monkeypatch.setattr(moves, "_MOST_LISTED", 0)
    check_skews(wk.Wafer.devices(5, 3), SKEWS)


def test_a_skew_goes_over_wafers_where_there_are_several(full_wafer):
    check_skews(full_wafer, (("x", "wafer", 1, 1, "plain"), ("wafer", "y", 3, 0, "plain")))


def test_a_route_sends_along_its_pairs_alone(full_wafer):
    east = full_wafer.width - 1
    # (axis, {destination: source}, fill)
    moves = [("x", {east: 0, 0: east}, 0), ("y", {0: 1}, 5), ("y", {1: 0, 0: 1}, 5)]
    moves += [("x", {}, 3), ("wafer", {0: 0}, 4)]

    def kernel(u):
        pairs = [[(source, to) for to, source in sent.items()] for _, sent, _ in moves]
        return [fabric.route(u, m[0], p, fill=m[2]) for m, p in zip(moves, pairs, strict=True)]

    check(full_wafer, kernel, lambda t: [take(t, axis, s.get, fill) for axis, s, fill in moves])


def test_a_broadcast_is_the_roots_tile(full_wafer):
    def kernel(u):
        sent: list[tuple[fabric.Along, int]] = [("x", 1), ("wafer", 0), (EVERY, 5)]
        return [fabric.broadcast(u, along, root) for along, root in sent]

    def plain(t):
        every = per_line(t, EVERY, lambda line: [line[5]] * len(line))
        return [take(t, "x", lambda i: 1), take(t, "wafer", lambda i: 0), every]

    check(full_wafer, kernel, plain)


def test_a_broadcast_takes_nothing_from_the_others(full_wafer):
    """Neither an infinity nor a truth elsewhere is seen; trees of any dtype are sent."""

    def kernel(u):
        rooted = fabric.axis_index("x") == 1
        sent = {"inf": jnp.where(rooted, u, jnp.inf), "nan": jnp.where(rooted, u, jnp.nan)}
        sent |= {"bool": jnp.where(rooted, u > 0, True), "int": u.astype(jnp.int8)}
        return fabric.broadcast(sent, "x", root=1)

    u = operand(full_wafer)
    got = full_wafer.map(kernel, in_specs=ALL, out_specs=ALL)(u)
    want = np.asarray(whole_of(take(tiles_of(u, full_wafer), "x", lambda i: 1)))
    wanted = {"inf": want, "nan": want, "bool": want > 0, "int": want.astype(np.int8)}
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_reduction_is_a_sum_on_the_root_or_on_every_pe(full_wafer):
    def kernel(u):
        sums = [fabric.all_reduce(u, along) for along in ("y", "wafer", GRID, EVERY)]
        means = [fabric.all_reduce(u, along, "mean") for along in ("x", GRID)]
        rooted = [fabric.reduce(u, "x", root=1), fabric.reduce(u, GRID, root=3, op="mean")]
        return [*sums, *means, *rooted]

    def plain(t):
        def everywhere(along, of):
            return per_line(t, along, lambda line: [of(line, 0)] * len(line))

        def plain_reduce(along, root, of):
            return per_line(t, along, lambda l: [of(l, 0) * (i == root) for i in range(len(l))])

        sums = [everywhere(along, jnp.sum) for along in ("y", "wafer", GRID, EVERY)]
        means = [everywhere(along, jnp.mean) for along in ("x", GRID)]
        return [*sums, *means, plain_reduce("x", 1, jnp.sum), plain_reduce(GRID, 3, jnp.mean)]

    check(full_wafer, kernel, plain)


def test_max_and_min_find_the_extremes(full_wafer):
    def kernel(u):
        most = [fabric.all_reduce(u, along, "max") for along in ("y", EVERY)]
        return [*most, fabric.all_reduce(u, GRID, "min"), fabric.reduce(u, "x", 1, "min")]

    def extremes(t):
        least = jnp.broadcast_to(t.min(2, keepdims=True), t.shape)
        rooted = least * (np.arange(t.shape[2]) == 1)[None, None, :, None, None, None]
        kept = [t.max(1, keepdims=True), t.max((0, 1, 2)), t.min((1, 2), keepdims=True), rooted]
        return [whole_of(jnp.broadcast_to(v, t.shape)) for v in kept]

    u = operand(full_wafer)
    got = full_wafer.map(kernel, in_specs=ALL, out_specs=ALL)(u)
    jax.tree.map(np.testing.assert_array_equal, got, extremes(tiles_of(u, full_wafer)))


def plain_all_gather(t, along, axis):
    return per_line(t, along, lambda line: [jnp.concatenate(line, axis - 3)] * len(line))


def plain_reduce_scatter(t, along, axis):
    return per_line(t, along, lambda line: jnp.split(line.sum(0), len(line), axis - 3))


def plain_all_to_all(t, along, split, concat):
    def new_line(line):
        parts = [jnp.split(tile, len(line), split - 3) for tile in line]
        return [jnp.concatenate([p[i] for p in parts], concat - 3) for i in range(len(line))]

    return per_line(t, along, new_line)


def test_gathers_and_scatters_keep_the_order_of_the_pes(full_wafer):
    lines: list[fabric.Along] = ["y", "wafer", GRID, ("x", "y"), EVERY]
    gathers = [(along, 1) for along in lines] + [("x", 2)]
    rings = [("y", 1), ("x", 2), ("wafer", 0)]
    scatters = [(along, 1) for along in lines] + [("x", -1)]

    def kernel(u):
        whole = [fabric.all_gather(u, *move) for move in gathers]
        around = [fabric.ring_all_gather(u, *move) for move in rings]
        return [*whole, *around, *(fabric.reduce_scatter(u, *move) for move in scatters)]

    def plain(t):
        whole = [plain_all_gather(t, *move) for move in [*gathers, *rings]]
        return [*whole, *(plain_reduce_scatter(t, along, axis % 3) for along, axis in scatters)]

    check(full_wafer, kernel, plain)


def test_all_to_all_deals_one_dimension_out_and_joins_another(full_wafer):
    moves = [("x", 1, 2), ("x", 2, 1), ("y", 1, 1), ("wafer", 2, 0)]
    check(
        full_wafer,
        lambda u: [fabric.all_to_all(u, *move) for move in moves],
        lambda t: [plain_all_to_all(t, *move) for move in moves],
    )


def test_an_operand_that_is_the_same_everywhere_moves_like_any_other(full_wafer):
    def kernel(u):
        return [
            fabric.shift(u, "x", 1, periodic=False, fill=3),
            fabric.skew(u, "x", "y"),
            fabric.route(u, "y", [(0, 1)]),
            fabric.broadcast(u, "x", root=1),
            fabric.reduce(u, GRID, root=2),
            fabric.all_reduce(u, GRID),
            fabric.all_gather(u, GRID, 1),
            fabric.reduce_scatter(u, GRID, 1),
            fabric.all_to_all(u, "x", 1, 2),
            fabric.all_to_all(fabric.all_reduce(u, "x"), "x", 2, 2),
        ]

    def plain(t):
        pes = t.shape[1] * t.shape[2]
        rooted = per_line(t, GRID, lambda line: [line.sum(0) * (i == 2) for i in range(pes)])
        shifted, routed = take(t, "x", lambda i: i - 1, 3), take(t, "y", {1: 0}.get)
        grouped = [
            t * pes,
            plain_all_gather(t, GRID, 1),
            plain_reduce_scatter(t, GRID, 1),
            plain_all_to_all(t, "x", 1, 2),
        ]
        return [
            shifted,
            t,
            routed,
            t,
            rooted,
            *grouped,
            plain_all_to_all(t * t.shape[2], "x", 2, 2),
        ]

    check(full_wafer, kernel, plain, spec=P())


def test_what_is_the_same_on_every_pe_leaves_once(full_wafer):
    """Its gradient is counted once too, not once for every copy."""

    def kernel(u):
        return [
            fabric.all_reduce(u, EVERY),
            fabric.broadcast(u, "y", root=1),
            fabric.all_gather(u, "x", 2, replicated=True),
            fabric.all_gather(u, EVERY, 1, replicated=True),
        ]

    def plain(u):
        t = tiles_of(u, full_wafer)
        kept = [t.sum((0, 1, 2), keepdims=True), t[:, 1:2], plain_all_gather(t, "x", 2)[:, :, :1]]
        return [whole_of(v) for v in [*kept, plain_all_gather(t, EVERY, 1)[:1, :1, :1]]]

    specs = [P(), P("wafer", None, "x"), P("wafer", "y"), P()]
    run = full_wafer.map(kernel, in_specs=ALL, out_specs=specs)
    got, want = (with_gradient(f, operand(full_wafer)) for f in (run, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_pe_knows_its_place_and_the_size_of_the_grid(full_wafer):
    axes: list[fabric.Along] = ["y", "x", "wafer", GRID, ("x", "y"), EVERY]

    def kernel():
        sizes = [jnp.full((1, 1, 1), fabric.axis_size(along)) for along in axes]
        return [fabric.axis_index(along).reshape(1, 1, 1) for along in axes], sizes

    places, sizes = full_wafer.map(kernel, in_specs=(), out_specs=ALL)()
    n, y, x = np.indices(places[0].shape)
    _, height, width = places[0].shape
    want = [y, x, n, y * width + x, x * height + y, (n * height + y) * width + x]
    jax.tree.map(np.testing.assert_array_equal, places, want)
    assert [s.flat[0] for s in map(np.asarray, sizes)] == [w.max() + 1 for w in want]


def test_a_fresh_carry_made_varying_can_be_scanned(full_wafer):
    def kernel(u):
        def step(carry, _):
            total, moved = carry
            return (total + moved, fabric.shift(moved, "x")), None

        start = fabric.varying(jnp.zeros_like(u)), fabric.varying(fabric.varying(u, "x"))
        (total, _), _ = lax.scan(step, start, length=fabric.axis_size("x"))
        return [total]

    check(full_wafer, kernel, lambda t: [jnp.broadcast_to(t.sum(2, keepdims=True), t.shape)])


OP: Any = "prod"
REFUSALS = {
    "stands twice": (
        lambda u: fabric.route(u, "x", [(0, 1), (2, 1)]),
        r"the destinations \[1, 1\] must be different places from 0 to 3 along 'x'",
    ),
    "outside": (lambda u: fabric.route(u, "y", [(2, 0)]), r"the sources \[2\] must be"),
    "root": (lambda u: fabric.broadcast(u, "x", root=4), "broadcast: root=4 is outside 0 to 3"),
    "root of reduce": (lambda u: fabric.reduce(u, GRID, -1), "root=-1 is outside 0 to 7"),
    "op": (lambda u: fabric.all_reduce(u, "x", OP), "op='prod' is not one of"),
    "scatter": (lambda u: fabric.reduce_scatter(u, "x", 0), "dimension 0 of a tile of shape"),
    "all to all": (lambda u: fabric.all_to_all(u, "y", 0, 1), "does not divide by the 2 PEs"),
    "axis": (lambda u: fabric.shift(u, "z"), "'z' is not an axis of the wafer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    kernel, message = REFUSALS[name]
    wafer = wk.Wafer.abstract(wk.WSE2, 2, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(wafer.map(kernel, in_specs=ALL, out_specs=ALL), operand(wafer))
