"""Stencil steps against the same update of a whole padded array."""

import functools
import os
import pathlib
import subprocess
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import wsekern as wk

SHAPE = (16, 16)
WEIGHTS = np.array([[1, -2, 3], [5, 100, -7], [11, 13, -17]]) / 128
INSIDE = (slice(1, -1),) * 2
LIBRARY = pathlib.Path(wk.__file__).parent


def field(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weighted(v):
    """Nine points, each of its own weight."""
    rows, columns = v.shape[0] - 2, v.shape[1] - 2
    return sum(
        jnp.float32(WEIGHTS[i, j]) * v[i : i + rows, j : j + columns]
        for i in range(3)
        for j in range(3)
    )


def star(v):
    around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
    return v[INSIDE] + 0.2 * (around - 4 * v[INSIDE])


def wave(state, c):
    u = state["u"]
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    new = 2 * u[INSIDE] - state["before"][INSIDE] + c[INSIDE] * (around - 4 * u[INSIDE])
    return {"u": new, "before": u[INSIDE]}


def run(u, update=weighted, *, radius=1, **options):
    return jax.jit(functools.partial(wk.stencil, update=update, radius=radius, **options))(u)


def plain(u, update, steps, mode="constant", fixed=False):
    """The same steps in numpy, by padding the whole array."""
    for _ in range(steps):
        new = np.array(update(np.pad(u, 1, mode=mode)), np.float32)
        if fixed:
            new[[0, -1]], new[:, [0, -1]] = u[[0, -1]], u[:, [0, -1]]
        u = new
    return u


def check_boundaries(modes, shape, steps, wafer):
    """A field for each boundary, all in one program, against numpy's padding by its mode."""
    every = {name: field(shape, seed) for seed, name in enumerate(modes)}
    boundaries = {name: name for name in modes}
    update = functools.partial(jax.tree.map, weighted)
    got = run(every, update, steps=steps, boundary=boundaries, wafer=wafer)
    for name, mode in modes.items():
        want = plain(every[name], weighted, steps, mode, name == "fixed")
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=3e-6, err_msg=name)


@pytest.mark.parametrize(
    ("name", "depth", "overlap"),
    [("1x1", None, None), ("2x4", 1, None), ("2x4", 4, None), ("2x4", 2, True)]
    + [("virtual-4x4", depth, None) for depth in (None, 2)],
)
def test_the_update_is_traced_once(name, depth, overlap, wafer_called):
    """And few of our functions stand between the user's call and the update in a traceback."""
    stacks = []

    def update(v, k, step):
        files = [frame.filename for frame in traceback.extract_stack()]
        stacks.append([file for file in files if str(LIBRARY) in file])
        return star(v) + k[INSIDE] * step

    wafer = wafer_called(name)
    go = functools.partial(
        wk.stencil, radius=1, steps=12, depth=depth, overlap=overlap, wafer=wafer
    )
    jax.block_until_ready(jax.jit(lambda u: go(u, update, coefficients=u))(field()))
    assert len(stacks) == 1
    assert max(len(stack) for stack in stacks) <= 10
    assert max(len(set(stack)) for stack in stacks) <= 6


def test_equals_the_plain_steps(wafer):
    check_boundaries({"zero": "constant", "periodic": "wrap"}, SHAPE, 5, wafer)


def test_boundaries_hold_in_every_step(full_wafer):
    modes = {"reflect": "reflect", "symmetric": "symmetric", "edge": "edge", "fixed": "edge"}
    check_boundaries(modes, SHAPE, 5, full_wafer)


def test_sizes_that_do_not_divide(full_wafer):
    modes = {"zero": "constant", "edge": "edge", "fixed": "edge"}
    check_boundaries(modes, (15, 14), 4, full_wafer)


def test_a_delta_reaches_each_cell_with_its_own_weight(full_wafer):
    """Exact: the weights are multiples of 1/128, and one step sums one of them."""
    for cell in ((0, 0), (7, 8), (15, 3)):
        u = np.zeros(SHAPE, np.float32)
        u[cell] = 1
        got = run(u, boundary="periodic", wafer=full_wafer)
        want = np.zeros(SHAPE)
        for i in range(3):
            for j in range(3):
                want[(cell[0] + 1 - i) % 16, (cell[1] + 1 - j) % 16] = WEIGHTS[i, j]
        np.testing.assert_array_equal(got, want)


def test_a_mode_decays_as_the_discrete_operator_says(full_wafer):
    x = np.cos(2 * np.pi * np.arange(16) / 16)
    u = np.outer(x, x).astype(np.float32)
    rate = 1 - 2 * 0.2 * 2 * (1 - np.cos(2 * np.pi / 16))
    got = run(u, star, steps=10, boundary="periodic", wafer=full_wafer)
    np.testing.assert_allclose(got, rate**10 * u, atol=1e-6)


def test_a_wave_disperses_and_turns_back():
    """A standing wave at its discrete frequency; run backwards it is what it was."""
    wafer, n, c = wk.Wafer.devices(2, 4), 32, 0.25
    k = 2 * np.pi * 3 / n
    frequency = 2 * np.arcsin(np.sqrt(c) * np.sin(k / 2))
    x = np.broadcast_to(np.cos(k * np.arange(n)), (n, n))
    state = {"u": np.float32(x), "before": np.float32(np.cos(frequency) * x)}
    go = jax.jit(
        functools.partial(
            wk.stencil,
            update=wave,
            radius=1,
            boundary="periodic",
            steps=20,
            coefficients=np.full((n, n), c, np.float32),
            wafer=wafer,
        )
    )
    there = go(state)
    np.testing.assert_allclose(there["u"], np.cos(20 * frequency) * x, atol=1e-4)
    back = go({"u": there["before"], "before": there["u"]})
    np.testing.assert_allclose(back["before"], state["u"], atol=1e-5)


def test_source_and_receiver_may_change_places(full_wafer):
    """Reciprocity: the record stays the same when source and receiver are exchanged."""
    a, b, steps = (3, 4), (12, 9), 24
    c = (0.2 + 0.05 * np.random.default_rng(3).uniform(size=SHAPE)).astype(np.float32)
    # Where the speed varies, the operator c * Laplacian is symmetric with weights 1 / c.
    pulse = np.zeros((steps, 1), np.float32)
    pulse[:4, 0] = [1, 2, -1, 0.5]

    def record_of(source, receiver):
        state = {"u": jnp.zeros(SHAPE), "before": jnp.zeros(SHAPE)}
        _, record = wk.stencil(
            state,
            wave,
            radius=1,
            steps=steps,
            coefficients=c,
            sources=wk.Sources(at=[source], values=pulse * c[source], field="u"),
            receivers=wk.Receivers(at=[receiver], field="u"),
            wafer=full_wafer,
        )
        return record

    there, back = record_of(a, b), record_of(b, a)
    assert there.shape == (steps, 1) and np.abs(there).max() > 0.01
    np.testing.assert_allclose(there, back, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_changes_nothing(wafer_called, depth):
    u, wafer = field(), wafer_called("2x4")
    options = {"boundary": ["reflect", "periodic"], "steps": 7}
    got = run(u, depth=depth, wafer=wafer, **options)
    np.testing.assert_allclose(got, run(u, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_bitwise_the_same_on_all_meshes_and_depths_without_fused_multiply_add():
    """In a process of its own, whose compiler may not fuse multiply and add."""
    root = pathlib.Path(__file__).parents[4]
    script = """
import functools
import wsekern as wk
wk.emulate_devices(16)
import jax, numpy as np
from tests.wsekern.kernels.stencil.test_stencil import field, weighted
wafers = [wk.Wafer.devices(*g) for g in ((2, 2), (2, 4), (4, 1), (1, 8), (2, 2, 2))]
wafers.append(wk.Wafer.virtual(wk.WSE2, 8, 8))
go = functools.partial(wk.stencil, update=weighted, radius=1, boundary="reflect", steps=8)
want = np.asarray(jax.jit(go)(field()))
for wafer, depth in [(w, None) for w in wafers] + [(wafers[1], 1), (wafers[1], 2)]:
    got = jax.jit(functools.partial(go, depth=depth, wafer=wafer))(field())
    assert np.array_equal(got, want), (wafer, depth)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=root,
        env={**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=AVX"},
    )
    assert done.stdout.split() == ["same"], done.stderr


def test_with_default_flags_within_four_ulp(wafer_called, as_shipped):
    def run(wafer):
        go = functools.partial(wk.stencil, update=weighted, radius=1, steps=20, wafer=wafer)
        go = functools.partial(go, boundary="reflect")
        return jax.jit(go, compiler_options=as_shipped)(field())

    want = run(None)
    ulp = np.spacing(np.abs(want).max())
    for name in ("2x4", "2of2x2", "virtual-4x4"):
        got = run(wafer_called(name))
        assert np.abs(np.asarray(got) - want).max() <= 4 * ulp


def test_words_of_a_step_are_the_hand_count():
    """For tiles of 16 x 16: rows, then columns with the corners; the same on every grid."""
    u = lambda wafer: jax.ShapeDtypeStruct((16 * wafer.height, 16 * wafer.width), jnp.float32)  # noqa: E731
    for grid in ((4, 4), (8, 16), (750, 994)):
        wafer = wk.Wafer.abstract(wk.WSE2, *grid)

        def traffic_of(update, wafer=wafer, **options):
            go = functools.partial(wk.stencil, update=update, radius=1, steps=20, **options)
            return wk.traffic(go, u(wafer), wafer=wafer)

        nine, five = traffic_of(weighted), traffic_of(star)
        assert (nine.words, nine.steps) == (20 * (2 * 16 + 2 * 18), 20 * 2)
        assert (five.words, five.steps) == (20 * 4 * 16, 20)
        deep = traffic_of(weighted, depth=4)
        assert (deep.words, deep.steps) == (5 * (2 * 4 * 16 + 2 * 4 * 24), 5 * 2)


def test_a_dimension_that_is_not_split_has_a_halo_only_if_asked(full_wafer):
    u = field((8, 8, 4))

    def update(v):
        return v[1:-1, 1:-1] + 0.5 * jnp.roll(v[2:, 1:-1], 1, 2)

    def deep(v):
        inner = v[1:-1, 1:-1]
        return inner[:, :, 1:-1] + 0.5 * v[2:, 1:-1, :-2]

    want = u
    for _ in range(3):
        v = np.pad(want, [(1, 1), (1, 1), (0, 0)])
        want = v[1:-1, 1:-1] + np.float32(0.5) * np.roll(v[2:, 1:-1], 1, 2)
    got = run(u, update, steps=3, wafer=full_wafer)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    with_halo = run(
        u, deep, radius=(1, 1, 1), boundary=["zero", "zero", "periodic"], steps=3, wafer=full_wafer
    )
    np.testing.assert_allclose(with_halo, want, rtol=1e-6)


def test_an_update_may_take_the_step_and_read_whole_arrays(full_wafer):
    forcing = np.arange(6, dtype=np.float32)

    def update(v, held, step):
        return v[INSIDE] + held["forcing"][step] * held["rows"][1:-1]

    rows = field((16, 1))
    got = run(
        field(),
        update,
        steps=6,
        coefficients={"forcing": forcing, "rows": rows},
        wafer=full_wafer,
    )
    np.testing.assert_allclose(got, field() + 15 * rows, rtol=1e-5, atol=1e-5)


def test_snapshots_and_records(full_wafer):
    at = [(0, 0), (7, 9), (15, 15)]
    last, saved, record = run(
        field(), steps=7, save_every=3, receivers=wk.Receivers(at=at), wafer=full_wafer
    )
    assert saved.shape == (2, *SHAPE) and record.shape == (7, 3)
    want = [plain(field(), weighted, n) for n in range(1, 8)]
    np.testing.assert_allclose(last, want[6], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(saved, [want[2], want[5]], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(
        record, [[w[cell] for cell in at] for w in want], rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("boundary", ["zero", "periodic"])
def test_sources_are_added_in_every_copy_of_their_cell(full_wafer, boundary):
    at, values = [(0, 0), (8, 7), (15, 12)], field((4, 3), 5)
    got = run(
        field(), steps=4, boundary=boundary, depth=2 if full_wafer.size == 8 else None,
        sources=wk.Sources(at=at, values=values), wafer=full_wafer,
    )  # fmt: skip
    want = field()
    for step in range(4):
        want = plain(want, weighted, 1, {"zero": "constant", "periodic": "wrap"}[boundary])
        for cell, value in zip(at, values[step], strict=True):
            want[cell] += value
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def test_forward_mode(full_wafer):
    u, du = field(), field(seed=1)
    go = functools.partial(wk.stencil, update=weighted, radius=1, steps=4, wafer=full_wafer)
    _, got = jax.jit(lambda u, du: jax.jvp(go, (u,), (du,)))(u, du)
    np.testing.assert_allclose(got, plain(du, weighted, 4), rtol=1e-5, atol=5e-6)


def test_in_a_shard_map_of_the_user():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = P("b", "a")
    per_pe = functools.partial(wk.stencil_tile, update=weighted, along=spec, radius=1, steps=5)
    got = jax.jit(jax.shard_map(per_pe, mesh=mesh, in_specs=spec, out_specs=spec))(field())
    np.testing.assert_allclose(got, plain(field(), weighted, 5), rtol=1e-5, atol=2e-6)


def test_in_a_kernel(full_wafer):
    spec = P("y", "x")
    per_pe = functools.partial(wk.stencil_tile, update=weighted, along=spec, radius=1, steps=2)
    got = full_wafer.map(per_pe, in_specs=spec, out_specs=spec)(field())
    np.testing.assert_allclose(got, plain(field(), weighted, 2), rtol=1e-5, atol=2e-6)


# With jax 0.12, XLA copies the buffer of a deeper halo twice for each exchange; with 0.10 never.
@pytest.mark.parametrize(("depth", "most"), [(2, 0), (4, 2)])
def test_no_step_copies_a_field(depth, most, as_shipped):
    """Two buffers take turns: the loop concatenates nothing and copies no field."""
    wafer = wk.Wafer.devices(2, 4)
    u = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=wafer.sharding(P("y", "x")))
    go = functools.partial(wk.stencil, update=star, radius=1, boundary="periodic", steps=64)
    lowered = jax.jit(functools.partial(go, wafer=wafer, depth=depth)).lower(u)
    program = lowered.compile(compiler_options=as_shipped).as_text()
    assert program is not None
    (body,) = [part for part in program.split("\n\n") if "collective-permute(" in part]
    assert body.count(" copy(") <= most
    assert "concatenate" not in body and "all-gather" not in body


def test_donated_memory_is_used(as_shipped):
    u = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    go = functools.partial(wk.stencil, update=star, radius=1, steps=4)
    program = jax.jit(go, donate_argnums=0).lower(u).compile(compiler_options=as_shipped)
    memory = program.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == 64 * 64 * 4


def test_donates_outside_jit(wafer_called):
    for wafer in (None, wafer_called("2x4")):
        u = jnp.array(field()) if wafer is None else wafer.shard(jnp.array(field()))
        got = wk.stencil(u, star, radius=1, steps=4, donate=True, wafer=wafer)
        assert u.is_deleted()
        np.testing.assert_array_equal(
            got, wk.stencil(field(), star, radius=1, steps=4, wafer=wafer)
        )


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 2}, r"radius is .*\(2, 2\).* it takes \[2, 2\] cells off"),
        ({"update": lambda v: v[INSIDE].astype(jnp.bfloat16)}, "makes bfloat16 of float32; cast"),
        ({"update": lambda v: (v[INSIDE],)}, "it must give the fields that it takes"),
        ({"radius": 9}, "radius of dimension 0 is .* 8 is the largest"),
        ({"depth": 5}, "depth=5 .* the largest depth is 4"),
        ({"depth": 0}, "depth=0 must be an integer of 1 or more"),
        ({"steps": -1}, "steps=-1 must be an integer of 0 or more"),
        ({"checkpoint": "all"}, "checkpoint='all' is not 'sqrt'"),
        ({"sources": wk.Sources(at=[(1, 16)], values=np.ones((1, 1)))}, r"has \(1, 16\), outside"),
        ({"sources": wk.Sources(at=[(1, 1)], values=np.ones((2, 1)))}, r"it must be \(1, 1\)"),
        ({"receivers": wk.Receivers(at=[1, 2])}, r"receivers.at is \(2,\), it must be \(points, 2"),
        ({"receivers": wk.Receivers(at=[(0.5, 1)])}, "it must be whole cells"),
        ({"receivers": wk.Receivers(at=[(0, 1)], field="v")}, "'v' is not one of the fields"),
    ],
)
def test_refuses(options, message):
    options = {"update": weighted, "radius": 1, "wafer": wk.Wafer.devices(2, 4), **options}
    with pytest.raises(ValueError, match=f"^stencil: .*{message}"):
        wk.stencil(field(), **options)
