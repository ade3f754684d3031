"""Fields on a mesh of the user's, without a wafer: whether their split is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
by_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])


def mesh_of(*kinds):
    count = 2 ** len(kinds)
    names = ("a", "b", "c")[: len(kinds)]
    return jax.make_mesh((2,) * len(kinds), names, kinds, devices=jax.devices()[:count])


def laid_out(mesh, spec, shape=(8, 8)):
    field = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return field, jax.device_put(field, NamedSharding(mesh, spec))


def step(v):
    return v[1:-1, 1:-1] + 2 * v[2:, 1:-1] + 3 * v[1:-1, :-2]


def stepped(u, steps=2, **options):
    return wk.stencil(u, step, radius=1, boundary="periodic", steps=steps, **options)


def plain(u, steps=2):
    for _ in range(steps):
        u = u + 2 * np.roll(u, -1, 0) + 3 * np.roll(u, 1, 1)
    return u


def exchanged(u):
    return wk.halo_exchange(u, 1, boundary="periodic")


@by_kind
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("b", "a"), P(("a", "b")), P()])
def test_a_stencil_is_the_same_field_on_every_mesh(spec, kind):
    field, u = laid_out(mesh_of(kind, kind), spec)
    np.testing.assert_allclose(stepped(u), plain(field), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(stepped)(u), plain(field), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [(AUTO,), (EXPLICIT,), (AUTO,) * 3, (EXPLICIT,) * 3])
def test_meshes_of_one_and_of_three_axes(kinds):
    mesh = mesh_of(*kinds)
    field, u = laid_out(mesh, P("a"))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(stepped)(u), plain(field), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stepped(u), plain(field), rtol=1e-5, atol=1e-5)


@by_kind
def test_under_vmap_and_grad(kind):
    """XLA's partitioner gives other values, if the steps of one device are left to it."""
    batch, u = laid_out(mesh_of(kind, kind), P(None, "a", "b"), (2, 8, 8))
    want = np.stack([plain(field) for field in batch])
    got = jax.jit(jax.vmap(stepped))(u)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # The gradient of a linear function, which reads nothing of the field itself.
    with jax.set_mesh(u.sharding.mesh):
        gradient = jax.jit(jax.grad(lambda u: jnp.sum(stepped(u[0]))))(u)
    np.testing.assert_allclose(gradient[0], 36, rtol=1e-5)


def test_the_gradient_of_linear_steps_knows_its_devices():
    _, u = laid_out(mesh_of(AUTO, AUTO), P("a", "b"))
    gradient = jax.jit(jax.grad(lambda u: jnp.sum(stepped(u))))(u)
    np.testing.assert_allclose(gradient, 36, rtol=1e-5)


def test_on_auto_axes_a_split_that_the_shape_depends_on_has_to_be_given():
    mesh = mesh_of(AUTO, AUTO)
    _, u = laid_out(mesh, P("a", "b"))
    tiles = exchanged(u)
    assert tiles.shape == (12, 12)
    first_cell = lambda u: exchanged(u)[0, 0]  # noqa: E731
    for transformed in (jax.jit(exchanged), jax.vmap(exchanged), jax.grad(first_cell)):
        with pytest.raises(ValueError, match="Auto axes 'a', 'b' .* give wafer=wsekern.Wafer.of"):
            transformed(u)
    with pytest.raises(ValueError, match="crop: inside jit, grad and vmap"):
        jax.jit(lambda tiles: wk.crop(tiles, 1))(tiles)
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    given = jax.jit(lambda u: wk.halo_exchange(u, 1, boundary="periodic", wafer=wafer))
    np.testing.assert_array_equal(given(u), tiles)
    whole = wk.Wafer.devices(1, 1)
    alone = jax.jit(lambda u: wk.halo_exchange(u, 1, wafer=whole))
    assert alone(u).shape == (10, 10)


def test_on_explicit_axes_the_split_is_known_in_jit_too():
    _, u = laid_out(mesh_of(EXPLICIT, EXPLICIT), P("a", "b"))
    np.testing.assert_array_equal(jax.jit(exchanged)(u), exchanged(u))
    assert jax.jit(jax.vmap(exchanged))(jnp.stack([u, u])).shape == (2, 12, 12)


def test_a_field_too_small_for_its_mesh_is_whole_on_every_device():
    """Its own split is not known, so no other may be asked for."""
    field, u = laid_out(mesh_of(AUTO, AUTO, AUTO), P(), (3, 5))
    np.testing.assert_allclose(jax.jit(stepped)(u), plain(field), rtol=1e-5, atol=1e-5)


def test_fields_of_which_only_the_second_is_split():
    field, u = laid_out(mesh_of(AUTO, AUTO), P("a", "b"))
    tiles = exchanged({"first": field, "second": u})
    np.testing.assert_array_equal(tiles["first"], exchanged(u))


def test_a_split_over_auto_and_explicit_axes():
    """A stencil is over the Explicit ones, as inside jit; a shape that depends on it is refused."""
    mesh = mesh_of(AUTO, EXPLICIT)
    for spec in (P("a", "b"), P(("b", "a"))):
        field, u = laid_out(mesh, spec)
        for run in (stepped, jax.jit(stepped)):
            np.testing.assert_allclose(run(u), plain(field), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="make them all Auto or all Explicit"):
            exchanged(u)
        with pytest.raises(ValueError, match="Auto axes 'a' of its mesh"):
            jax.jit(exchanged)(u)


@by_kind
def test_a_wafer_of_some_axes_of_a_mesh(kind):
    mesh = mesh_of(kind, kind, kind)
    field, u = laid_out(mesh, P("c", "a"))
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    got = jax.jit(lambda u: stepped(u, steps=3, depth=2, wafer=wafer))(u)
    np.testing.assert_allclose(got, plain(field, 3), rtol=1e-5, atol=1e-5)


@by_kind
def test_solvers(kind):
    def operator(x):
        return wk.stencil(x, lambda v: 5 * v[1:-1, 1:-1] - v[2:, 1:-1] - v[:-2, 1:-1], radius=1)

    field, b = laid_out(mesh_of(kind, kind), P("a", "b"))
    matrix = 5 * np.eye(8) - np.eye(8, k=1) - np.eye(8, k=-1)
    for run in (wk.cg, wk.bicgstab, jax.jit(wk.cg, static_argnums=0)):
        solution = run(operator, b)
        assert solution.converged
        np.testing.assert_allclose(solution.x, np.linalg.solve(matrix, field), atol=1e-4)


@pytest.mark.parametrize("kinds", [(EXPLICIT, EXPLICIT), (AUTO, EXPLICIT), (AUTO, AUTO)])
def test_solvers_under_vmap_and_grad(kinds):
    """Each lane ends when it has converged; the gradient, which reads no b, knows its devices."""

    def solve(solver, b):
        def operator(x):
            return wk.stencil(x, lambda v: 5 * v[1:-1, 1:-1] - v[2:, 1:-1] - v[:-2, 1:-1], radius=1)

        return solver(operator, b)

    matrix = 5 * np.eye(8) - np.eye(8, k=1) - np.eye(8, k=-1)
    field, b = laid_out(mesh_of(*kinds), P(None, "a", "b"), (3, 8, 8))
    scales = np.array([1, 1e-25, 0], np.float32).reshape(3, 1, 1)
    field, b = field * scales, b * scales
    weights = jnp.cos(jnp.arange(64.0)).reshape(8, 8)
    for solver in (wk.cg, wk.bicgstab):
        got = jax.jit(jax.vmap(lambda b, solver=solver: solve(solver, b)))(b)
        want = np.linalg.solve(matrix, np.float64(field))
        for x, y, scale in zip(np.asarray(got.x, np.float64), want, (1, 1e-25, 1), strict=True):
            np.testing.assert_allclose(x / scale, y / scale, atol=1e-4)
        assert got.converged.all() and got.iterations[2] == 0 and np.all(got.iterations[:2])
        loss = lambda b, solver=solver: (  # noqa: E731
            jax.vmap(lambda b: solve(solver, b).x)(b) * weights[None]
        ).sum()
        want = np.broadcast_to(np.linalg.solve(matrix, np.asarray(weights)), field.shape)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(b), want, atol=1e-4)


def test_multigrid_on_explicit_axes():
    def laplacian_at(level):
        def update(v):
            near = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
            return (4 * v[1:-1, 1:-1] - near) / level**2

        return lambda x: wk.stencil(x, update, radius=1, boundary=lambda near: -near)

    field, b = laid_out(mesh_of(EXPLICIT, EXPLICIT), P("a", "b"))
    solution = wk.multigrid(laplacian_at, b, diagonal_at=lambda level: 4 / level**2)
    assert solution.converged
    alone = wk.multigrid(laplacian_at, jnp.asarray(field), diagonal_at=lambda level: 4 / level**2)
    np.testing.assert_allclose(solution.x, alone.x, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "spec", "update"),
    [
        ((8, 8), P(None, "a"), lambda v: v[:, 1:-1] + v[:, 2:]),
        ((4, 4, 4), P("a", None, "b"), lambda v: v[1:-1, 1:-1, 1:-1] + v[2:, 2:, :-2]),
    ],
)
def test_one_radius_is_meant_where_the_update_takes_cells_off(shape, spec, update):
    field, u = laid_out(mesh_of(AUTO, AUTO), spec, shape)
    radius = tuple(int(n < size) for n, size in zip(update(field).shape, shape, strict=True))
    want = update(np.pad(field, [(r, r) for r in radius], mode="edge"))

    def run(u):
        return wk.stencil(u, update, radius=1, boundary="edge")

    for got in (run(u), jax.jit(run)(u), run(field)):
        np.testing.assert_allclose(got, want, rtol=1e-6)
