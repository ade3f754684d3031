"""Several programs side by side, and grids of the devices that work."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.wafer.placement.failed_devices import rectangle

GRID = P("y", "x")


def shift_and_sum(u):
    return fabric.shift(u, "x") + fabric.all_reduce(u.sum(), ("y", "x"))


@pytest.mark.parametrize("backend", ["devices", "virtual"])
def test_regions_run_their_own_programs(backend):
    wafer = wk.Wafer.devices(4, 4) if backend == "devices" else wk.Wafer.virtual(wk.WSE2, 4, 4)
    parts = wafer.split(2, 2)
    assert [part.corner for part in parts] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    assert len(set(parts)) == 4
    alone = wk.Wafer.devices(2, 2)
    for i, part in enumerate(parts):
        u = np.arange(16.0, dtype=np.float32).reshape(4, 4) + i
        got, want = (w.map(shift_and_sum, in_specs=GRID, out_specs=GRID)(u) for w in (part, alone))
        np.testing.assert_array_equal(got, want)
    if backend == "devices":
        used = [d for part in parts for d in part.device_mesh.devices.flat]
        assert sorted(d.id for d in used) == sorted(d.id for d in wafer.device_mesh.devices.flat)


def test_a_region_is_cut_out_of_what_the_wafer_is():
    defects = wk.Defects.random(wk.WSE2, 0.99)
    whole = wk.Wafer.abstract(wk.WSE2, 40, 60, 2, defects=defects)
    part = whole.region(10, 20, 5, 7).region(1, 2, 3, 4)
    assert (part.height, part.width, part.wafers, part.corner) == (3, 4, 2, (11, 22))
    assert dict(part.device_mesh.shape) == {"wafer": 2, "y": 3, "x": 4}
    assert part.placement is not None and whole.placement is not None
    at = slice(11, 14), slice(22, 26)
    np.testing.assert_array_equal(part.placement.columns, whole.placement.columns[at])
    assert [(w.height, w.width) for w in whole.split(3, 1)] == [(14, 60), (13, 60), (13, 60)]


def test_a_region_of_your_own_mesh_keeps_its_other_axes():
    mesh = jax.make_mesh((2, 2, 4), ("data", "seq", "model"), (AxisType.Auto,) * 3)
    part = wk.Wafer.of(mesh, y="seq", x="model").region(0, 1, 2, 2)
    assert dict(part.device_mesh.shape) == {"data": 2, "seq": 2, "model": 2}
    np.testing.assert_array_equal(part.device_mesh.devices, mesh.devices[:, :, 1:3])


def test_virtual_regions_of_one_size_are_one_program():
    a, b = wk.Wafer.virtual(wk.WSE2, 4, 4).split(1, 2)
    c = wk.Wafer.virtual(wk.WSE2, 4, 2, defects=wk.Defects.random(wk.WSE2))
    assert len({id(w.map(shift_and_sum, in_specs=GRID, out_specs=GRID)) for w in (a, b, c)}) == 1


def test_failed_devices_are_left_out():
    wafer = wk.Wafer.devices(3, 5, failed=[6])
    assert sorted(d.id for d in wafer.device_mesh.devices.flat) == [i for i in range(16) if i != 6]
    some = wk.Wafer.devices(1, 2, devices=jax.devices()[:3], failed=[1])
    assert [d.id for d in some.device_mesh.devices.flat] == [0, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: wk.Wafer.devices(4, 4, failed=[3]),
            r"4x4 does not fit the 15 devices that work, 1 left out as failed; the largest good "
            r"grid is 3x5: Wafer.devices\(height=3, width=5, failed=",
        ),
        (
            lambda: wk.Wafer.devices(2, 4, 2, failed=[0, 1, 2]),
            r"2x2x4 does .* grid is 2x2x3: Wafer.devices\(height=2, width=3, wafers=2, failed",
        ),
        (lambda: wk.Wafer.devices(2, 2, failed=[99]), r"names \[99\], which are no devices here"),
        (lambda: wk.Wafer.devices(2, 2).region(1, 0, 2, 1), r"2x1 PEs from \(1, 0\) on are not"),
        (lambda: wk.Wafer.devices(2, 2).split(3, 1), "rows=3 must be from 1 to the 2 PEs there"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def chips(rows, columns, *failed):
    return [
        SimpleNamespace(id=r * columns + c, coords=(r, c, 0))
        for r in range(rows)
        for c in range(columns)
        if r * columns + c not in failed
    ]


def test_chips_in_a_plane_are_taken_from_a_good_rectangle():
    chosen = rectangle(chips(4, 4, 1), 3, 4)
    assert chosen is not None
    assert [[d.id for d in row] for row in chosen] == [list(range(i, i + 4)) for i in (4, 8, 12)]
    turned = rectangle(chips(2, 4), 4, 2)
    assert turned is not None and [d.id for d in turned[0]] == [0, 4]
    with pytest.raises(ValueError, match="4x4 does not fit the 15 .* largest good grid is 4x2|3x4"):
        rectangle(chips(4, 4, 1), 4, 4)
    assert rectangle(jax.devices(), 2, 2) is None
