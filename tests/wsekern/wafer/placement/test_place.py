"""Where PEs lie on wafers with defects: against counts by hand, and what no placement may break."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.estimator.cost import Constants
from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.place import largest, place
from wsekern.wafer.placement.routes import routes
from wsekern.wafer.placement.yields import harvest, table

GRID = P("y", "x")
FREE = Constants(
    vector_start=0.0, product_start=0.0, phase_start=0.0, paired_float32=1.0, accumulate_float32=1.0
)


def faulty(rows, columns, *places):
    out = np.zeros((rows, columns), bool)
    for place_ in places:
        out[place_] = True
    return Defects.of(out)


@pytest.mark.parametrize(
    ("machine", "height", "width"),
    [(wk.WSE3, 755, 1170), (wk.WSE2, 994, 750), (wk.WSE2, 300, 40), (wk.WSE1, 600, 595)],
)
@pytest.mark.parametrize("pe_yield", [0.999, 0.98])
def test_every_pe_lies_on_a_good_one_of_its_own_in_order(machine, height, width, pe_yield):
    defects = Defects.random(machine, pe_yield, seed=3)
    placement = place(defects, height, width)
    rows, columns = placement.rows, placement.columns
    assert rows.shape == columns.shape == (height, width)
    there = defects.faulty if height <= defects.shape[0] else defects.faulty.T
    assert placement.physical == there.shape
    assert not there[rows, columns].any()
    assert len(np.unique(rows * there.shape[1] + columns)) == height * width
    assert (np.diff(columns, axis=1) > 0).all() or (np.diff(rows, axis=0) > 0).all()
    # A few places aside, not as many as there are faults in a row.
    assert max(placement.longest.values()) <= 8


def test_a_wafer_without_faults_is_taken_as_it_is():
    placement = place(Defects.random((6, 9), 1.0), 5, 7)
    np.testing.assert_array_equal(placement.rows, np.indices((5, 7))[0])
    np.testing.assert_array_equal(placement.columns, np.indices((5, 7))[1])
    assert placement.stretch == {"y": 1.0, "x": 1.0} and placement.longest == {"y": 1, "x": 1}


def test_a_fault_is_passed_over_and_counted_by_hand():
    """Row 1 misses its second PE, so its others stand one further east; nothing else moves."""
    placement = place(faulty(3, 5, (1, 1)), 3, 4)
    np.testing.assert_array_equal(placement.columns, [[0, 1, 2, 3], [0, 2, 3, 4], [0, 1, 2, 3]])
    east = tuple((i, i + 1) for i in range(3))
    south = ((0, 1), (1, 2))
    assert routes(placement, ("x",), east) == (2, pytest.approx(10 / 9), {"E": 1})
    # Down from row 0 three of four go one place east first, and from row 1 one place west.
    assert routes(placement, ("y",), south) == (2, 1.75, {"E": 1, "W": 1, "S": 1})
    assert placement.stretch == {"y": 4 / 2, "x": 4 / 3}


def test_tiles_that_go_aside_meet_on_the_links():
    placement = place(faulty(2, 6, (1, 0), (1, 1)), 2, 4)
    np.testing.assert_array_equal(placement.columns, [[0, 1, 3, 4], [2, 3, 4, 5]])
    assert routes(placement, ("y",), ((0, 1),)) == (3, 2.5, {"E": 2, "S": 1})


def test_a_row_with_too_few_good_pes_is_skipped():
    placement = place(faulty(4, 4, (1, slice(0, 3))), 3, 4)
    np.testing.assert_array_equal(placement.rows[:, 0], [0, 2, 3])
    assert placement.longest == {"y": 2, "x": 1}


def test_a_folded_ring_has_no_far_neighbors():
    placement = place(Defects.random((8, 9), 1.0), 6, 7, folded=True)
    for axis, size in (("y", 6), ("x", 7)):
        ring = tuple((i, (i + 1) % size) for i in range(size))
        assert routes(placement, (axis,), ring).longest == 2


def test_cannon_on_a_folded_wafer_is_the_kernel_on_a_folded_ring():
    a = jax.ShapeDtypeStruct((256, 256), jnp.float16)

    def cycles(algorithm, folded):
        wafer = wk.Wafer.abstract(wk.WSE2, 64, 64, folded=folded)
        return wk.estimate(functools.partial(wk.matmul, algorithm=algorithm), a, a, wafer=wafer)

    folded = cycles("cannon", True)
    assert folded.cycles == cycles("mesh_gemm", False).cycles
    assert folded.extra_cycles == folded.cycles - cycles("cannon", False).cycles < 0


def test_a_shift_takes_the_hops_of_its_farthest_tile():
    defects = faulty(757, 1000, (1, 1), (1, 2))
    wafer = wk.Wafer.abstract(wk.WSE2, 3, 4, defects=defects)

    def cycles(along):
        kernel = functools.partial(fabric.shift, along=along, periodic=False)
        run = wafer.map(kernel, in_specs=GRID, out_specs=GRID)
        e = wk.estimate(run, jax.ShapeDtypeStruct((3, 40), "f4"), wafer=wafer, constants=FREE)
        return e.cycles, e.extra_cycles, e.words

    # Ten words, hops, two ramps and a step: along x one tile has two faults to pass.
    assert cycles("x") == (10 + 3 + 5, 2, {"E": 10})
    # Along y three tiles go up to two places aside.
    assert cycles("y") == (10 + 3 + 5, 2, {"E": 10, "W": 10, "S": 10})


def test_a_reduction_goes_down_the_longer_line():
    a = jax.ShapeDtypeStruct((64, 64), "f4")
    kernel = functools.partial(fabric.all_reduce, along="x", algorithm="chain")
    e = {}
    for defects in (None, Defects.random(wk.WSE2, 0.95)):
        wafer = wk.Wafer.abstract(wk.WSE2, 64, 64, defects=defects)
        run = wafer.map(kernel, in_specs=GRID, out_specs=P("y", None))
        e[defects is None] = wk.estimate(run, a, wafer=wafer)
    placement = e[False].wafer.placement
    assert placement is not None
    stretch = placement.stretch["x"]
    assert e[False].extra_cycles == pytest.approx(2 * 63 * (stretch - 1))
    assert e[False].cycles == e[True].cycles + e[False].extra_cycles
    assert "PEs faulty" in str(e[False]) and "faulty" not in str(e[True])


def test_one_percent_of_faulty_pes_changes_no_number_and_costs_cycles():
    defects = Defects.random(wk.WSE2, 0.99)
    good, bad = (wk.Wafer.virtual(wk.WSE2, 16, 16, defects=d) for d in (None, defects))
    a = jax.random.normal(jax.random.key(0), (32, 32))
    run = functools.partial(wk.matmul, algorithm="cannon")
    np.testing.assert_array_equal(run(a, a, wafer=bad), run(a, a, wafer=good))
    e = wk.estimate(run, a, a, wafer=bad)
    assert e.extra_cycles > 0
    assert e.cycles == wk.estimate(run, a, a, wafer=good).cycles + e.extra_cycles


def test_maps_and_wafers_are_equal_by_value():
    one, same, other = (Defects.random(wk.WSE2, 0.99, seed) for seed in (0, 0, 1))
    assert one == same != other and len({one, same, other}) == 2
    wafers = [wk.Wafer.virtual(wk.WSE2, 20, 30, defects=d) for d in (one, same, other, None)]
    assert wafers[0] == wafers[1] and len(set(wafers)) == 3
    with pytest.raises(ValueError, match="read-only"):
        one.faulty[0, 0] = True
    mask = np.zeros((3, 4), bool)
    kept = Defects.of(mask)
    mask[:] = True
    assert kept.count == 0
    assert repr(kept) == "<Defects 0 of 3x4 PEs>" and kept.turned().shape == (4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Defects.random(wk.WSE2, 1.1), "pe_yield=1.1 must be from 0 to 1"),
        (lambda: Defects.random((0, 3)), "0x3 has no PE"),
        (lambda: Defects.of(np.zeros(3)), r"faulty has shape \(3,\); it must be \[rows, columns\]"),
        (
            lambda: wk.Wafer.abstract(wk.WSE3, defects=Defects.random(wk.WSE3, 0.9)),
            r"755x1170 PEs do not fit a wafer of 762x1272, 97,230 of them faulty: the largest "
            r"rectangle that does is 760x1115, and 755 rows have 1119 columns at most",
        ),
        (
            lambda: wk.Wafer.virtual(wk.WSE2, 2, 2, defects=Defects.of(np.ones((3, 3)))),
            "3x3, 9 of them faulty: none works",
        ),
        (
            lambda: wk.Wafer.virtual(wk.WSE2, 2, 2, defects=Defects.random((800, 3))),
            "a map of 800x3 PEs is larger than WSE-2, which has 757x1122",
        ),
        (lambda: harvest(wk.WSE2, [2.0]), r"densities=\[2.0\] from 0 to 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_largest_rectangle_is_the_largest():
    defects = faulty(3, 4, (0, 0), (0, 1), (0, 2), (2, 3))
    assert largest(defects) == (2, 3) and largest(defects, 3) == (3, 1)
    assert largest(defects, 1) == (1, 4)


def test_of_more_faults_less_is_left():
    harvests = harvest(wk.WSE3, (0.0, 0.01, 0.1), wafers=20)
    whole, most, least = harvests
    assert whole.rectangle == wk.WSE3.physical and whole.share == whole.untouched == 1.0
    assert most.whole == 1.0 and least.whole == 0.0
    assert whole.share > most.share > least.share
    # Drawing every PE leaves about as much as `harvest`, which draws one number for each row.
    rows, columns = largest(Defects.random(wk.WSE3, 0.99))
    assert rows * columns == pytest.approx(most.rectangle[0] * most.rectangle[1], rel=0.01)
    assert table(harvests).count("\n") == 4
