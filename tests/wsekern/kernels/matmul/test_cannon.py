"""Cannon's algorithm and MeshGEMM only shift tiles, round a ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import loops

import wsekern as wk

both_rings = pytest.mark.parametrize("algorithm", ["cannon", "mesh_gemm"])


def product(algorithm):
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wk.Wafer.devices(4, 4))


@both_rings
def test_tiles_only_move(algorithm):
    """Cannon's promise: no operand is gathered and no result reduced, forward or backward."""
    run, a, b = product(algorithm), jnp.ones((8, 8)), jnp.ones((8, 8))
    forward = jax.jit(run).lower(a, b)
    gradient = jax.jit(lambda a, b, dc: jax.vjp(run, a, b)[1](dc)).lower(a, b, a)
    for program in (forward.as_text(), gradient.as_text()):
        assert "stablehlo.collective_permute" in program
        for other in ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"):
            assert other not in program


@both_rings
def test_tiles_shift_once_less_than_there_are_products(algorithm):
    run = product(algorithm)
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr
    ((body, length),) = loops(jaxpr)
    assert length == 3
    moves = [e for e in body.eqns if e.primitive.name == "ppermute"]
    assert len(moves) == 2


@pytest.mark.parametrize(("algorithm", "hops"), [("cannon", 3), ("mesh_gemm", 2)])
def test_no_shift_of_the_folded_ring_is_longer_than_two_hops(algorithm, hops):
    run = product(algorithm)
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr
    ((body, _),) = loops(jaxpr)
    pairs = [p for e in body.eqns if e.primitive.name == "ppermute" for p in e.params["perm"]]
    assert max(abs(i - j) for i, j in pairs) == hops


@both_rings
def test_a_rectangle_moves_blocks_and_never_gathers(algorithm):
    run = functools.partial(wk.matmul, algorithm=algorithm, wafer=wk.Wafer.devices(2, 4))
    operands = jnp.ones((8, 8)), jnp.ones((8, 8))
    jaxpr = jax.make_jaxpr(run)(*operands).jaxpr
    ((_, length),) = loops(jaxpr)
    assert length == 3
    assert "all_gather" not in str(jaxpr) and "psum" not in str(jaxpr)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (3, 6), (1, 4)], ids=str)
@both_rings
def test_rectangles(algorithm, grid):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-9, 10, shape).astype(np.float32) for shape in ((5, 13), (13, 7)))
    wafer = wk.Wafer.virtual(wk.WSE2, *grid)
    c = jax.jit(functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer))(a, b)
    np.testing.assert_array_equal(c, a @ b)


@pytest.mark.parametrize("algorithm", ["cannon", "xla"])
def test_on_explicit_axes(algorithm):
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2)
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    rng = np.random.default_rng(0)
    # Whole numbers, whose products and sums are exact.
    shapes = (4, 16), (16, 8), (4, 8)
    whole = [rng.integers(-15, 16, shape).astype(np.float32) for shape in shapes]
    a, b, dc = (jax.device_put(x, NamedSharding(mesh, P("a", "b"))) for x in whole)

    @jax.jit
    def call(a, b, dc):
        run = functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    with jax.set_mesh(mesh):
        results = call(a, b, dc)
    A, B, DC = whole
    for got, want in zip(results, (A @ B, DC @ B.T, A.T @ DC), strict=True):
        assert jax.typeof(got).sharding.spec == P("a", "b")
        np.testing.assert_array_equal(got, want)
