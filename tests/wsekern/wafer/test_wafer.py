"""Wafers of devices, of a mesh, virtual and abstract; kernels mapped over them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric

TILED = P("y", "x")
TWO: Any = np.int64(2)


def matrix(height=8, width=16):
    return np.arange(height * width, dtype=np.float32).reshape(height, width)


def own_mesh(kind: AxisType = AxisType.Auto) -> Any:
    """A mesh as a user has it: other names, and an axis that is no part of the grid."""
    return jax.make_mesh((2, 2, 4), ("data", "seq", "model"), (kind,) * 3)


def test_devices_are_a_mesh_of_rows_and_columns():
    wafer = wk.Wafer.devices(2, 4)
    assert (wafer.backend, wafer.size, wafer.axes) == ("devices", 8, ("y", "x"))
    assert dict(wafer.device_mesh.shape) == {"y": 2, "x": 4}
    assert [wafer.axis_size(axis) for axis in ("wafer", "y", "x")] == [1, 2, 4]


def test_several_wafers_are_the_outermost_axis():
    wafer = wk.Wafer.devices(2, 4, wafers=2)
    assert (wafer.size, wafer.axes) == (16, ("wafer", "y", "x"))
    assert dict(wafer.device_mesh.shape) == {"wafer": 2, "y": 2, "x": 4}


def test_devices_named_by_the_caller_keep_their_order():
    named = jax.devices()[8:4:-1]
    assert list(wk.Wafer.devices(2, 2, devices=named).device_mesh.devices.flat) == named


def test_a_virtual_wafer_has_no_mesh():
    wafer = wk.Wafer.virtual(wk.WSE2, 3, 5, wafers=2)
    assert (wafer.backend, wafer.size, wafer.machine) == ("virtual", 30, wk.WSE2)
    assert wafer.axes == ("wafer", "y", "x")
    with pytest.raises(ValueError, match="virtual 2x3x5 of WSE-2> has no mesh"):
        _ = wafer.device_mesh


def test_an_abstract_wafer_is_all_that_a_program_can_use_unless_told_otherwise():
    whole = wk.Wafer.abstract(wk.WSE3)
    assert (whole.height, whole.width) == (wk.WSE3.usable_height, wk.WSE3.usable_width)
    part = wk.Wafer.abstract(wk.WSE3, height=10, wafers=3)
    assert dict(part.device_mesh.shape) == {"wafer": 3, "y": 10, "x": wk.WSE3.usable_width}


def test_a_grid_fits_the_machine_either_way_round():
    long, short = wk.WSE2.usable_width, wk.WSE2.usable_height
    assert wk.Wafer.virtual(wk.WSE2, long, short).height == long
    assert wk.Wafer.abstract(wk.WSE2, short, long).height == short


def test_your_own_mesh_is_adopted_by_the_names_of_its_axes():
    mesh = own_mesh()
    wafer = wk.Wafer.of(mesh, y="model", x="seq", wafer="data")
    assert (wafer.height, wafer.width, wafer.wafers) == (4, 2, 2)
    assert wafer.mesh == mesh
    assert [wafer.axis_name(axis) for axis in ("wafer", "y", "x")] == ["data", "model", "seq"]
    assert wafer.mesh_spec(P("wafer", None, ("y", "x"))) == P("data", None, ("model", "seq"))
    assert wk.Wafer.of(mesh, y="seq", x="model").mesh_spec(P("wafer", "y")) == P(None, "seq")


def mixed_mesh():
    return jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto, AxisType.Explicit))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wk.Wafer.devices(0, 4), "height is 0, it must be an integer of 1 or more"),
        (lambda: wk.Wafer.devices(2, -1), "width is -1"),
        (lambda: wk.Wafer.virtual(wk.WSE2, 2, 2, wafers=0), "wafers is 0"),
        (lambda: wk.Wafer(backend="virtual", height=2.0, width=2), "height is 2.0"),  # type: ignore[arg-type]
        (lambda: wk.Wafer.devices(5, 4), r"5x4 needs 20 devices, there are 16; .*_devices\(20\)"),
        (lambda: wk.Wafer.devices(3, 3, wafers=2), "2x3x3 needs 18 devices, there are 16"),
        (lambda: wk.Wafer.devices(1, 2, devices=jax.devices()[:1]), "needs 2 devices, there are 1"),
        (lambda: wk.Wafer.of(own_mesh(), y="rows", x="seq"), "y='rows' is not an axis of the mesh"),
        (lambda: wk.Wafer.of(own_mesh(), y="seq", x="seq"), "names one mesh axis twice"),
        (lambda: wk.Wafer.of(mixed_mesh(), y="a", x="b"), "make them all Auto or all Explicit"),
        (lambda: wk.Wafer.virtual(wk.WSE2, 995, 2), "995x2 PEs do not fit WSE-2, .* 750x994, eit"),
        (lambda: wk.Wafer.abstract(wk.WSE1, 600, 600), "600x600 PEs do not fit WSE-1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wafers_are_equal_by_value():
    def make():
        return [
            wk.Wafer.devices(2, 4),
            wk.Wafer.devices(4, 2),
            wk.Wafer.devices(2, 4, devices=jax.devices()[8:]),
            wk.Wafer.virtual(wk.WSE2, 2, 4),
            wk.Wafer.virtual(wk.WSE3, 2, 4),
            wk.Wafer.abstract(wk.WSE2, 2, 4),
            wk.Wafer.of(own_mesh(), y="seq", x="model"),
            wk.Wafer.of(own_mesh(), y="model", x="seq"),
        ]

    assert make() == make()
    assert len({*make(), *make()}) == len(make())
    assert hash(wk.Wafer.devices(TWO, 4)) == hash(wk.Wafer.devices(2, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        wk.Wafer.devices(2, 4).height = 3  # type: ignore[misc]


def scale_and_sum(tree, scale):
    """Of one tile of a tree: two results laid out differently, and a sum that all PEs have."""
    total = fabric.all_reduce(tree["u"].sum(), ("y", "x"))
    return {"u": tree["u"] * scale[None], "v": [tree["v"] + scale[0]]}, total


SCALED = {
    "in_specs": ({"u": TILED, "v": P(("y", "x"))}, P()),
    "out_specs": ({"u": TILED, "v": P(("x", "y"))}, P()),
}


@pytest.mark.parametrize("backend", ["devices", "virtual", "abstract"])
def test_map_takes_and_gives_trees_on_every_backend(backend):
    grid = (2, 4) if backend == "devices" else (wk.WSE2, 2, 4)
    wafer = getattr(wk.Wafer, backend)(*grid)
    operands = {"u": matrix(), "v": np.arange(16)}, np.array([1, 2, 1, 2])
    program = wafer.map(scale_and_sum, **SCALED)
    # Tile i of the vector lies on PE (i // 4, i % 4), whose place in ("x", "y") is another.
    by_columns = np.arange(16).reshape(2, 4, 2).transpose(1, 0, 2).reshape(16)
    want = ({"u": matrix() * np.tile(operands[1], 4), "v": [by_columns + 1]}, matrix().sum())
    if backend == "abstract":
        got = jax.eval_shape(program, *operands)
        assert jax.tree.map(lambda s: s.shape, got) == jax.tree.map(np.shape, want)
        assert got[0]["v"][0].dtype == jnp.int32
    else:
        jax.tree.map(np.testing.assert_array_equal, program(*operands), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_operations_run_on_your_arrays_in_your_own_jit(kind):
    mesh = own_mesh(kind)
    wafer = wk.Wafer.of(mesh, y="seq", x="model")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 8)), rng.normal(size=(8, 12))

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def yours(a, b):
        return jnp.tanh(wk.matmul(jnp.sin(a), b, wafer=wafer)).sum()

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def plain(a, b):
        return jnp.tanh(jnp.sin(a) @ b).sum()

    with jax.set_mesh(mesh):
        a = jax.device_put(a.astype("f4"), NamedSharding(mesh, P("data", None, "model")))
        b = jax.device_put(b.astype("f4"), NamedSharding(mesh, P("seq", "model")))
        got = jax.jit(yours)(a, b)
        assert [g.sharding for g in got[1]] == [a.sharding, b.sharding]
    want = jax.jit(plain)(np.asarray(a), np.asarray(b))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, want)


def shift(u):
    return fabric.shift(u, "y")


@pytest.mark.parametrize(
    ("kind", "kept"), [(AxisType.Auto, "data"), (AxisType.Explicit, None)], ids=["Auto", "Explicit"]
)
def test_along_an_axis_of_your_mesh_that_is_not_the_grids_every_pe_does_the_same(kind, kept):
    mesh = own_mesh(kind)
    wafer = wk.Wafer.of(mesh, y="seq", x="model")
    spec = P(None, "y", "x")
    whole = matrix(4, 8).reshape(2, 4, 4)
    u = jax.device_put(whole, NamedSharding(mesh, P("data", "seq", "model")))
    moved = wafer.map(shift, in_specs=spec, out_specs=spec)(u)
    assert moved.sharding.spec == P(kept, "seq", "model")
    alone = wk.Wafer.virtual(wk.WSE2, wafer.height, wafer.width)
    np.testing.assert_array_equal(moved, alone.map(shift, in_specs=spec, out_specs=spec)(whole))


@pytest.mark.parametrize(
    "spec", [TILED, P(None, "x"), P(("y", "x")), P("x"), P("wafer", ("x", "y"))]
)
def test_a_tile_is_what_the_pes_device_holds(spec):
    wafer = wk.Wafer.devices(2, 2, wafers=2)
    u = wafer.shard(matrix(), spec)
    assert u.sharding == wafer.sharding(spec)
    places = {device: at for at, device in np.ndenumerate(wafer.device_mesh.devices)}
    for shard in u.addressable_shards:
        n, y, x = places[shard.device]
        np.testing.assert_array_equal(wafer.tile(u, y, x, n, spec), shard.data)


def test_a_virtual_pes_tile_is_a_slice():
    wafer = wk.Wafer.virtual(wk.WSE2, 2, 4, wafers=2)
    u = wafer.shard(matrix())
    assert u.sharding == wafer.sharding(TILED)
    np.testing.assert_array_equal(wafer.tile(u, 1, 2), matrix()[4:, 8:12])
    np.testing.assert_array_equal(
        wafer.tile(u, 1, 2, 1, P("wafer", ("x", "y"))), matrix()[4:, 10:12]
    )


@pytest.mark.parametrize("backend", ["devices", "virtual"])
def test_an_array_is_laid_out_inside_jit_too(backend):
    wafer = wk.Wafer.devices(2, 4) if backend == "devices" else wk.Wafer.virtual(wk.WSE2, 2, 4)
    laid_out = jax.jit(lambda u: wafer.shard(u + 1, P("x", "y")))(matrix())
    assert laid_out.sharding.is_equivalent_to(wafer.sharding(P("x", "y")), 2)
    np.testing.assert_array_equal(laid_out, matrix() + 1)


def stray():
    return jax.device_put(matrix(), jax.devices()[15])


def run_shift(operand, spec=TILED):
    return wk.Wafer.devices(2, 4).map(shift, in_specs=spec, out_specs=spec)(operand)


def in_virtual(spec, out=TILED):
    wafer = wk.Wafer.virtual(wk.WSE2, 2, 4)
    return wafer.map(shift, in_specs=spec, out_specs=out)(matrix())


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda w: w.tile(matrix(), 2, 0), "y=2 is outside the grid, which has 2 along y"),
        (lambda w: w.tile(matrix(), 0, -1), "x=-1 is outside the grid, which has 4 along x"),
        (lambda w: w.tile(matrix(), 0, 0, 1), "wafer=1 is outside the grid, which has 1"),
        (
            lambda w: w.tile(matrix(7), 0, 0),
            r"Wafer.tile: dimension 0 .* \(7, 16\) does not divide",
        ),
        (lambda w: w.shard(matrix(8, 18)), "Wafer.shard: dimension 1 .* 4 PEs .*; pad it to 20"),
        (lambda w: w.shard(matrix(), P("z")), "'z' in .* is not one of"),
        (lambda w: w.shard(np.ones(8), TILED), "has 1 dimensions, its spec .* has 2"),
        (
            lambda w: run_shift(stray()),
            r"committed to 1 device\(s\) .* move it with wafer.shard\(array",
        ),
        (lambda w: run_shift(matrix(9)), r"Wafer.map: dimension 0 .* \(9, 16\) .*; pad it to 10"),
        (
            lambda w: run_shift(np.ones(8)),
            r"Wafer.map: an operand of shape \(8,\) has 1 dimensions",
        ),
        (lambda w: run_shift(matrix(), P("Y", "x")), "Wafer.map: 'Y' in .* is not one of"),
        (lambda w: run_shift(matrix(), ("y", "x")), "'y' stands where a .*PartitionSpec belongs"),
        (lambda w: in_virtual(P("X")), "Wafer.map: 'X' in .* is not one of"),
    ],
)
def test_refuses_by_name(use, message):
    with pytest.raises(ValueError, match=message):
        use(wk.Wafer.devices(2, 4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("y", "X"), "'X' in .* is not one of"),
        (P("y", "y"), "'y' stands twice"),
        (P("y", "x", None), "a result of a PE has 2 dimensions, its spec .* has 3"),
    ],
)
def test_refuses_a_spec_that_does_not_fit_a_result(spec, message):
    with pytest.raises(ValueError, match=message):
        in_virtual(TILED, spec)


def test_the_mend_for_a_stray_array_mends_it():
    wafer = wk.Wafer.devices(2, 4)
    got = run_shift(wafer.shard(stray(), TILED))
    np.testing.assert_array_equal(got, np.roll(matrix(), 4, 0))


def test_a_tile_of_an_explicit_array_is_cut_too():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    whole = np.arange(16.0, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(wafer.tile(wafer.shard(whole), 1, 0), whole[2:, :2])


def test_refuses_explicit_axes_beside_its_own_auto_ones():
    kinds = (AxisType.Explicit, AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2, 2), ("d", "a", "b"), axis_types=kinds)
    with pytest.raises(ValueError, match="make all alike"):
        wk.Wafer.of(mesh, y="a", x="b")


@pytest.mark.parametrize("use", [wk.Wafer.shard, lambda w, u: wk.matmul(u, u, wafer=w)])
def test_an_abstract_wafer_refuses_to_compute(use):
    with pytest.raises(ValueError, match="only traced over, never run on"):
        use(wk.Wafer.abstract(wk.WSE3, 2, 2), np.ones((4, 4), np.float32))


def test_a_mesh_is_no_wafer():
    mesh: Any = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="is a Mesh, not a Wafer; adopt a mesh with"):
        wk.matmul(jnp.ones((4, 4)), jnp.ones((4, 4)), wafer=mesh)


@pytest.mark.parametrize(
    ("wafer", "rows"),
    [
        (
            wk.Wafer.devices(2, 4),
            [("backend", "devices"), ("grid", "2x4, 8 PEs"), ("devices", "8 x cpu")],
        ),
        (
            wk.Wafer.virtual(wk.WSE2, 2, 4, 2, devices=(1, 2)),
            [
                ("backend", "virtual"),
                ("grid", "2x2x4, 16 PEs"),
                ("machine", "WSE-2"),
                ("devices", "2 x cpu"),
            ],
        ),
        (
            wk.Wafer.abstract(wk.WSE3),
            [("backend", "abstract"), ("grid", "755x1170, 883,350 PEs"), ("machine", "WSE-3")],
        ),
    ],
    ids=["devices", "virtual", "abstract"],
)
def test_a_notebook_shows_a_table(wafer, rows):
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    assert wafer._repr_html_() == f"<table>{cells}</table>"
