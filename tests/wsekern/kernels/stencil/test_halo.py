"""Halos against `numpy.pad`: boundaries, widths, corners and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk

SHAPE = (16, 16)
# boundary -> the arguments of numpy's pad
MODES: dict[Any, dict[str, Any]] = {
    "periodic": {"mode": "wrap"},
    "zero": {},
    "edge": {"mode": "edge"},
    "fixed": {"mode": "edge"},
    "reflect": {"mode": "reflect"},
    "symmetric": {"mode": "symmetric"},
    2.5: {"constant_values": 2.5},
}


def field(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def grid_of(wafer):
    return (1, 1) if wafer is None else (wafer.height * wafer.wafers, wafer.width)


def exchange(u, width=1, **options):
    return jax.jit(functools.partial(wk.halo_exchange, width=width, **options))(u)


def around_each_tile(whole, tiles, widths):
    """The tiles of a padded whole, each with its halo, side by side."""
    rows = [n // p for n, p in zip(np.subtract(whole.shape, np.sum(widths, 1)), tiles, strict=True)]
    span = [n + sum(w) for n, w in zip(rows, widths, strict=True)]
    return np.block(
        [
            [
                whole[y * rows[0] : y * rows[0] + span[0], x * rows[1] : x * rows[1] + span[1]]
                for x in range(tiles[1])
            ]
            for y in range(tiles[0])
        ]
    )


@pytest.mark.parametrize("boundary", ["periodic", "reflect"])
def test_each_tile_has_the_halo_that_numpy_pads(wafer, boundary):
    got = exchange(field(), boundary=boundary, wafer=wafer)
    want = np.pad(field(), 1, **MODES[boundary])
    np.testing.assert_array_equal(got, around_each_tile(want, grid_of(wafer), [(1, 1)] * 2))


def test_every_boundary(full_wafer):
    """One field for each boundary, all in one program."""
    u = {str(name): field(seed=seed) for seed, name in enumerate(MODES)}
    got = exchange(u, boundary={str(name): name for name in MODES}, wafer=full_wafer)
    for name, mode in MODES.items():
        whole = np.pad(u[str(name)], 1, **mode)
        want = around_each_tile(whole, grid_of(full_wafer), [(1, 1)] * 2)
        np.testing.assert_array_equal(got[str(name)], want)


def test_crop_is_the_inverse(wafer):
    u = field()
    got = exchange(u, 2, wafer=wafer)
    cropped = jax.jit(functools.partial(wk.crop, width=2, wafer=wafer))(got)
    np.testing.assert_array_equal(cropped, u)


def test_a_cell_arrives_at_every_tile_that_is_near(full_wafer):
    """Every cell has its own value, so each halo cell says where it came from."""
    u = np.arange(1.0, 257.0, dtype=np.float32).reshape(SHAPE)
    got = exchange(u, ((2, 1), (0, 2)), boundary="periodic", wafer=full_wafer)
    padded = np.pad(u, [(2, 1), (0, 2)], mode="wrap")
    np.testing.assert_array_equal(
        got, around_each_tile(padded, grid_of(full_wafer), [(2, 1), (0, 2)])
    )


def test_no_wafer_pads():
    u = field((5, 7))
    np.testing.assert_array_equal(exchange(u, 2, boundary="reflect"), np.pad(u, 2, mode="reflect"))


def test_sides_may_differ(full_wafer):
    u = field()
    got = exchange(u, boundary=[("edge", 3.0), "periodic"], wafer=full_wafer)
    whole = np.pad(u, [(1, 0), (0, 0)], mode="edge")
    whole = np.pad(whole, [(0, 1), (0, 0)], constant_values=3.0)
    whole = np.pad(whole, [(0, 0), (1, 1)], mode="wrap")
    np.testing.assert_array_equal(
        got, around_each_tile(whole, grid_of(full_wafer), [(1, 1), (1, 1)])
    )


def test_a_boundary_may_be_a_function(full_wafer):
    """Odd about the wall, as the velocity of a fluid that meets it."""
    u = field()
    odd = lambda near: -jnp.flip(near, 0)  # noqa: E731
    got = exchange(u, 2, boundary=[odd, "zero"], wafer=full_wafer)
    whole = np.concatenate([-u[1::-1], u, -u[:-3:-1]])
    whole = np.pad(whole, [(0, 0), (2, 2)])
    np.testing.assert_array_equal(
        got, around_each_tile(whole, grid_of(full_wafer), [(2, 2), (2, 2)])
    )


@pytest.mark.parametrize("boundary", ["zero", "reflect"])
def test_sizes_that_do_not_divide(full_wafer, boundary):
    u = field((15, 14))
    got = np.asarray(exchange(u, boundary=boundary, wafer=full_wafer))
    tiles = grid_of(full_wafer)
    rows = [-(-n // p) for n, p in zip(u.shape, tiles, strict=True)]
    whole = np.pad(u, 1, **MODES[boundary])
    for y in range(tiles[0]):
        for x in range(tiles[1]):
            at = [y * rows[0], x * rows[1]]
            want = whole[at[0] : at[0] + rows[0] + 2, at[1] : at[1] + rows[1] + 2]
            tile = got[y * (rows[0] + 2) :, x * (rows[1] + 2) :]
            np.testing.assert_array_equal(tile[: want.shape[0], : want.shape[1]], want)
    cropped = wk.crop(got, 1, shape=u.shape, wafer=full_wafer)
    np.testing.assert_array_equal(cropped, u)


def test_fields_of_several_dtypes_go_in_one_message():
    wafer = wk.Wafer.devices(2, 4)
    u = {
        "h": field(),
        "b": field(seed=1).astype(jnp.bfloat16),
        "n": np.arange(256, dtype=np.int32).reshape(SHAPE) - 2**30,
        "mask": field(seed=2) > 0,
    }
    run = jax.jit(functools.partial(wk.halo_exchange, width=1, boundary="periodic", wafer=wafer))
    got = run(u)
    for name, one in u.items():
        want = around_each_tile(np.pad(one, 1, mode="wrap"), (2, 4), [(1, 1)] * 2)
        assert got[name].dtype == one.dtype
        np.testing.assert_array_equal(got[name], want)
    assert run.lower(u).as_text().count("stablehlo.collective_permute") == 4


def test_boundaries_by_the_name_of_a_field(full_wafer):
    u = {"h": field(), "v": field(seed=1)}
    got = exchange(u, boundary={"h": "edge", "v": 0.0}, wafer=full_wafer)
    for name, mode in (("h", "edge"), ("v", "zero")):
        whole = np.pad(u[name], 1, **MODES[mode])
        want = around_each_tile(whole, grid_of(full_wafer), [(1, 1)] * 2)
        np.testing.assert_array_equal(got[name], want)


def test_without_corners_all_messages_go_in_one_step():
    wafer = wk.Wafer.abstract(wk.WSE2, 4, 8)
    u = jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def traffic_of(**options):
        return wk.traffic(functools.partial(wk.halo_exchange, width=1, **options), u, wafer=wafer)

    with_them, without = traffic_of(), traffic_of(corners=False)
    assert (with_them.words, with_them.steps, with_them.moves) == (2 * 8 + 2 * 10, 2, 4)
    assert (without.words, without.steps, without.moves) == (4 * 8, 1, 4)
    wafer = wk.Wafer.devices(2, 4)
    got = exchange(field(), corners=False, boundary="periodic", wafer=wafer)
    want = around_each_tile(np.pad(field(), 1, mode="wrap"), (2, 4), [(1, 1)] * 2)
    tile, whole = np.asarray(got)[:10, :6], want[:10, :6]
    np.testing.assert_array_equal(tile[1:-1], whole[1:-1])
    np.testing.assert_array_equal(tile[:, 1:-1], whole[:, 1:-1])


def test_gradient_and_forward_mode(full_wafer):
    u, du = field(), field(seed=1)
    run = functools.partial(wk.halo_exchange, width=2, boundary="reflect", wafer=full_wafer)
    ct = field(np.shape(jax.eval_shape(run, u)), seed=2)

    def plain(u):
        whole = jnp.pad(u, 2, mode="reflect")
        gy, gx = grid_of(full_wafer)
        h, w = 16 // gy, 16 // gx
        rows = [whole[y * h : y * h + h + 4] for y in range(gy)]
        return jnp.concatenate(
            [jnp.hstack([r[:, x * w : x * w + w + 4] for x in range(gx)]) for r in rows]
        )

    both = lambda f: jax.jit(  # noqa: E731
        lambda u, du, ct: (jax.vjp(f, u)[1](ct)[0], jax.jvp(f, (u,), (du,))[1])
    )(u, du, ct)
    for got, want in zip(both(run), both(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("b", "a"), P(("b", "c"), "a")])
def test_in_a_shard_map_of_the_user(spec):
    mesh = jax.make_mesh((2, 2, 4), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    along = (*spec, *[None] * (2 - len(spec)))
    per_pe = functools.partial(wk.halo_tile, along=along, width=1, boundary="periodic")
    tiles = [
        int(np.prod([mesh.shape[n] for n in ((e,) if isinstance(e, str) else e or ())]))
        for e in along
    ]
    u = field()
    got = jax.jit(jax.shard_map(per_pe, mesh=mesh, in_specs=spec, out_specs=spec))(u)
    widths = [(1, 1) if e else (0, 0) for e in along]
    whole = np.pad(u, widths, mode="wrap")
    np.testing.assert_array_equal(got, around_each_tile(whole, tiles, widths))


def test_three_dimensions_split():
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    spec = P("c", "a", "b")
    u = field((4, 4, 4))
    per_pe = functools.partial(wk.halo_tile, along=spec, width=1, boundary="reflect")
    got = jax.jit(jax.shard_map(per_pe, mesh=mesh, in_specs=spec, out_specs=spec))(u)
    whole = np.pad(u, 1, mode="reflect")
    for z, y, x in np.ndindex(2, 2, 2):
        np.testing.assert_array_equal(
            np.asarray(got)[4 * z : 4 * z + 4, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4],
            whole[2 * z : 2 * z + 4, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4],
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("b", "a")])
def test_a_split_array_needs_no_wafer(spec, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    laid = NamedSharding(mesh, spec)
    u = jax.device_put(field(), laid)
    got = wk.halo_exchange(u, 1, boundary="periodic")
    assert got.sharding.is_equivalent_to(laid, 2)
    tiles = [mesh.shape[e] if e else 1 for e in (*spec, None)][:2]
    widths = [(1, 1) if n > 1 else (0, 0) for n in tiles]
    want = around_each_tile(np.pad(field(), widths, mode="wrap"), tiles, widths)
    np.testing.assert_array_equal(got, want)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 9}, r"width of dimension 0 is \(9, 9\).* 8 cells: 8 is the largest"),
        ({"width": 4, "boundary": "reflect"}, "4 cells: 3 is the largest with boundary 'reflect'"),
        ({"width": -1}, r"width of dimension 0 is \(-1, -1\); it must be cells, 0 or more"),
        ({"width": (1, 1, 1)}, "width has 3 entries, the field 2 dimensions"),
        ({"boundary": "wall"}, "boundary 'wall' is not one of"),
        ({"boundary": ["periodic"]}, "boundary has 1 entries, the field 2 dimensions"),
        ({"boundary": [("periodic", "zero"), 0]}, "periodic at both ends or at none"),
        ({"boundary": {"h": 0}}, "'h' is not one of the fields"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=f"^halo_exchange: .*{message}|{message}"):
        wk.halo_exchange(field(), **{"width": 1, **options}, wafer=wk.Wafer.devices(2, 4))


@pytest.mark.refuses
def test_refuses_a_periodic_size_that_does_not_divide():
    with pytest.raises(ValueError, match="periodic, and its 15 cells do not divide by the 2 PEs"):
        wk.halo_exchange(field((15, 16)), 1, boundary="periodic", wafer=wk.Wafer.devices(2, 4))


@pytest.mark.refuses
def test_refuses_fields_of_several_shapes():
    with pytest.raises(ValueError, match="the fields have shapes"):
        wk.halo_exchange((field(), field((8, 8))), 1)
