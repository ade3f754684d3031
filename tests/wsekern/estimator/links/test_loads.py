"""The load of each link, against tiles that are walked over the grid one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.estimator.links import loads, trees
from wsekern.fabric.moves import ring_order

GRID = P("y", "x")
SIZES = {"wafer": 1, "y": 5, "x": 7}


def walk(pairs, shape):
    """Words on each PE's links, if every pair (from, to) moves one word along x, then along y."""
    link_loads = {d: np.zeros(shape) for d in "NESW"}
    for (y, x), (to_y, to_x) in pairs:
        while x != to_x:
            link_loads["E" if to_x > x else "W"][y, x] += 1
            x += 1 if to_x > x else -1
        while y != to_y:
            link_loads["S" if to_y > y else "N"][y, x] += 1
            y += 1 if to_y > y else -1
    return link_loads


def estimate_of(kernel, height, width, tile=(1, 1)):
    wafer = wk.Wafer.abstract(wk.WSE2, height, width)
    a = jax.ShapeDtypeStruct((height * tile[0], width * tile[1]), jnp.float32)
    return wk.estimate(wafer.map(kernel, in_specs=GRID, out_specs=GRID), a, wafer=wafer)


def assert_same(link_loads, wanted):
    for direction in "NESW":
        np.testing.assert_allclose(link_loads[direction], wanted[direction], err_msg=direction)


@pytest.mark.parametrize(
    ("along", "by", "periodic", "ring"),
    [("x", 1, True, "plain"), ("x", -2, False, "plain"), ("y", 3, True, "plain"),
     ("x", 1, True, "folded"), ("y", -1, True, "folded")],
)  # fmt: skip
def test_a_shift_loads_the_links_that_its_tiles_cross(along, by, periodic, ring):
    shape = height, width = 5, 7
    e = estimate_of(
        lambda t: fabric.shift(t, along, by, periodic=periodic, ring=ring), height, width, (2, 3)
    )
    order = ring_order(width if along == "x" else height, ring)
    pairs = []
    for y in range(height):
        for x in range(width):
            at = order.index(x if along == "x" else y) + by
            if periodic or 0 <= at < len(order):
                to = order[at % len(order)]
                pairs.append(((y, x), (y, to) if along == "x" else (to, x)))
    wanted = walk(pairs, shape)
    link_loads = e.link_words()
    assert_same(link_loads, {d: 6 * w for d, w in wanted.items()})
    assert all(link_loads[d].max() == e.words.get(d, 0) for d in "NESW")


def test_a_move_along_both_axes_turns_where_routes_turn():
    shape = (4, 6)
    source = np.arange(24)
    to = np.random.default_rng(0).permutation(24)
    at = [tuple(map(int, np.unravel_index(pe, shape))) for pe in range(24)]
    pairs = [(at[a], at[b]) for a, b in zip(source, to, strict=True)]
    most, pattern = loads.permutation_loads(("y", "x"), {"y": 4, "x": 6}, source, to)
    wanted = walk(pairs, shape)
    assert_same(loads.total_loads([(pattern, 1.0)], {"y": 4, "x": 6}), wanted)
    assert dict(most) == {d: w.max() for d, w in wanted.items()}


def test_trips_of_a_loop_are_multiplied():
    def kernel(tile):
        return lax.scan(lambda t, _: (fabric.shift(t, "x") * 2.0, None), tile, length=100)[0]

    link_loads, once = (
        estimate_of(k, 2, 6).link_words() for k in (kernel, lambda t: fabric.shift(t, "x"))
    )
    assert_same(link_loads, {d: 100 * w for d, w in once.items()})


def test_floods_from_all_pes_in_turn_load_the_edges_most():
    """As in SUMMA: each PE of a line sends its tile once, to all PEs on either side."""
    e = estimate_of(lambda t: fabric.flood(t, "x"), 3, 5)
    link_loads = e.link_words()
    np.testing.assert_allclose(link_loads["E"], np.tile([0.2, 0.4, 0.6, 0.8, 0.0], (3, 1)))
    np.testing.assert_allclose(link_loads["W"], link_loads["E"][:, ::-1])
    assert not link_loads["N"].any() and not link_loads["S"].any()


def test_a_broadcast_loads_the_links_away_from_its_root():
    def kernel(tile):
        tile = fabric.broadcast(tile, ("y", "x"), root=7)  # y = 1, x = 2
        return lax.scan(lambda t, _: (fabric.broadcast(t, "x", root=4), None), tile, length=9)[0]

    link_loads = estimate_of(kernel, 3, 5).link_words()
    east, west = np.zeros((3, 5)), np.tile([0, 9, 9, 9, 9], (3, 1))
    east[1, 2:4] = 1
    west[1, 1:3] += 1
    assert_same(link_loads, {
        "E": east, "W": west, "S": np.tile([[0], [1], [0]], 5), "N": np.tile([[0], [1], [0]], 5)
    })  # fmt: skip


def test_a_gather_brings_every_tile_to_every_pe():
    e = estimate_of(lambda t: fabric.all_gather(t, "y", axis=0)[:1], 4, 3)
    pairs = [((y, x), (to, x)) for x in range(3) for y, to in ((0, 3), (1, 3), (2, 3))]
    np.testing.assert_allclose(e.link_words()["S"], walk(pairs, (4, 3))["S"])
    pairs = [((y, x), (0, x)) for x in range(3) for y in range(4)]
    np.testing.assert_allclose(e.link_words()["N"], walk(pairs, (4, 3))["N"])


def test_an_exchange_loads_the_middle_most():
    shape, sizes = (1, 6), {"y": 1, "x": 6}
    pairs = [((0, a), (0, b)) for a in range(6) for b in range(6)]
    link_loads = loads.total_loads([(loads.LinkPattern(kind="exchange", axes=("x",)), 6.0)], sizes)
    assert_same(link_loads, walk(pairs, shape))
    scattered = loads.pattern_loads(loads.LinkPattern(kind="scatter", axes=("x",)), sizes)
    np.testing.assert_allclose(scattered["E"] * 6, [[5, 4, 3, 2, 1, 0]])
    spread = loads.pattern_loads(loads.LinkPattern(kind="relayout"), {"y": 6, "x": 6})
    assert {load.max() for load in spread.values()} == {1.0}


TREES = ["star", "chain", "tree", "two_phase", "optimal", "k_tree", "snake"]


@pytest.mark.parametrize("algorithm", TREES)
@pytest.mark.parametrize("root", [0, 17, 34])
def test_a_tree_brings_every_pe_to_its_root(algorithm, root):
    """From every PE, a path of loaded links leads to the root."""
    link_loads = trees.reduction_loads(algorithm, root, 64.0, ("y", "x"), SIZES)
    steps = {"N": (-1, 0), "S": (1, 0), "E": (0, 1), "W": (0, -1)}
    height, width = SIZES["y"], SIZES["x"]
    home = divmod(root, width)
    for start in np.ndindex(height, width):
        seen, front = {start}, [start]
        while front:
            y, x = front.pop()
            for direction, (down, right) in steps.items():
                to = y + down, x + right
                if link_loads[direction][y, x] and to not in seen:
                    assert 0 <= to[0] < height and 0 <= to[1] < width
                    seen.add(to)
                    front.append(to)
        assert home in seen


def test_loads_of_trees_equal_a_hand_count():
    line = {"y": 1, "x": 8}
    west = {
        a: trees.reduction_loads(a, 0, 1.0, ("x",), line)["W"][0] for a in ("star", "chain", "tree")
    }
    np.testing.assert_array_equal(west["star"], [0, 7, 6, 5, 4, 3, 2, 1])
    np.testing.assert_array_equal(west["chain"], [0, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(west["tree"], [0, 3, 2, 2, 1, 2, 1, 1])
    back = trees.reduction_loads("chain", None, 1.0, ("x",), line)
    np.testing.assert_array_equal(back["E"][0], [1, 1, 1, 1, 1, 1, 1, 0])
    around = trees.reduction_loads("ring", None, 1.0, ("x",), {"y": 1, "x": 2})
    np.testing.assert_allclose(around["E"], [[1.0, 0.0]])  # half a tile summed, half gathered


def test_the_links_of_a_full_wafer_are_counted():
    wafer = wk.Wafer.abstract(wk.WSE3)
    a = jax.ShapeDtypeStruct((wafer.height, wafer.width), jnp.float32)
    kernel = lambda t: fabric.all_reduce(fabric.shift(t, "x"), ("y", "x"), algorithm="two_phase")  # noqa: E731
    e = wk.estimate(wafer.map(kernel, in_specs=GRID, out_specs=P()), a, wafer=wafer)
    link_loads = e.link_words()
    assert {load.shape for load in link_loads.values()} == {(755, 1170)}
    assert link_loads["W"][:, 1:].min() >= 1  # the tile that comes back from the eastern edge
    assert not link_loads["W"][:, 0].any() and not link_loads["N"][0].any()


def test_a_branch_not_taken_leaves_no_events():
    def kernel(t):
        return lax.cond(t.sum() > 0, lambda t: t * 2.0, lambda t: jnp.exp(jnp.exp(t)), t)

    e = estimate_of(kernel, 2, 2, (8, 8))
    assert [v.name for v in e.events if v.name in ("mul", "exp")] == ["exp", "exp"]
