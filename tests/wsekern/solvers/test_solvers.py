"""Every solver against the dense solution, SciPy's iterations, and theory."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg

import wsekern as wk

N = 16
RNG = np.random.default_rng(0)
B = jnp.asarray(RNG.standard_normal((N, N)), jnp.float32)


def star(u, wind):
    """A positive Laplacian, and a wind along the first dimension, which makes it unsymmetric."""
    center = u[1:-1, 1:-1]
    down, up = u[2:, 1:-1], u[:-2, 1:-1]
    return 4 * center - down - up - u[1:-1, 2:] - u[1:-1, :-2] + wind * (down - up)


def poisson(wafer=None, wind=0.0, boundary="zero"):
    return functools.partial(
        wk.stencil,
        update=star,
        radius=1,
        boundary=boundary,
        corners=False,
        coefficients=jnp.float32(wind),
        wafer=wafer,
    )


def matrix(n, wind=0.0):
    eye = sp.eye(n)
    line = sp.diags([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], [-1, 0, 1])
    blown = sp.diags([-np.ones(n - 1), np.ones(n - 1)], [-1, 1])
    return (sp.kron(line, eye) + sp.kron(eye, line) + wind * sp.kron(blown, eye)).tocsr()


def iterations(solver, a, b, **options):
    count = []
    solver(a, np.float64(b).ravel(), rtol=1e-5, callback=lambda x: count.append(1), **options)
    return len(count)


def true_residual(x, b, wind=0.0):
    r = np.float64(b).ravel() - matrix(b.shape[0], wind) @ np.float64(x).ravel()
    return np.linalg.norm(r) / np.linalg.norm(b)


@pytest.mark.parametrize("grid", ["2x2", "2x4", "4x1", "2of2x2", "virtual-8x8", "3x3"])
def test_every_mesh_reaches_the_same_true_residual(grid, wafer_called):
    """In as many iterations as SciPy takes, or nearly; 16 cells do not divide by 3 rows of PEs."""
    wafer, wind = wafer_called(grid), 0.3

    @jax.jit
    def both(b):
        return wk.cg(poisson(wafer), b), wk.bicgstab(poisson(wafer, wind), b)

    for got, blown in zip(both(B), (0.0, wind), strict=True):
        assert bool(got.converged) and got.why == "converged"
        assert true_residual(got.x, B, blown) < 1.1e-5
        method = scipy.sparse.linalg.bicgstab if blown else scipy.sparse.linalg.cg
        theirs = iterations(method, matrix(N, blown), B)
        most = 1.3 * theirs + 2 if blown else theirs + 2
        assert int(got.iterations) <= most
        history = np.asarray(got.residuals)
        assert np.isfinite(history[: int(got.iterations) + 1]).all()
        assert np.isnan(history[int(got.iterations) + 1 :]).all()


def test_bicgstab_begins_anew_when_only_rounding_is_left():
    """A smooth right side in float32: products with the first residual soon are only rounding."""
    n = 64
    middle = (jnp.arange(n) + 0.5) / n
    smooth = jnp.outer(jnp.exp(-middle) * jnp.sin(6.28 * middle), jnp.sin(3.14 * middle))
    got = jax.jit(lambda b: wk.bicgstab(poisson(), b, tolerance=1e-4))(smooth / n**2)
    theirs = iterations(scipy.sparse.linalg.bicgstab, matrix(n), smooth)
    assert bool(got.converged) and int(got.iterations) <= 1.3 * theirs + 2


def test_as_many_iterations_as_there_are_eigenvalues():
    """Three, all positive or all negative: cg takes a negative definite operator too."""
    values = jnp.asarray(RNG.choice([1.0, 2.5, 7.0], (N, N)), jnp.float32)
    for sign in (1, -1):
        got = jax.jit(lambda b, s=sign: wk.cg(lambda u: s * values * u, b))(B)
        assert int(got.iterations) == 3 and bool(got.converged)


def test_preconditioned_as_scipy_is():
    weights = jnp.asarray(10.0 ** RNG.uniform(0, 2, (N, N)), jnp.float32)
    operator = lambda u: poisson()(u) + weights * u  # noqa: E731
    got = jax.jit(lambda b: wk.cg(operator, b, preconditioner=lambda r: r / (4 + weights)))(B)
    a = matrix(N) + sp.diags(np.float64(weights).ravel())
    theirs = iterations(scipy.sparse.linalg.cg, a, B, M=sp.diags(1 / a.diagonal()))
    assert bool(got.converged) and abs(int(got.iterations) - theirs) <= 2


def test_takes_the_names_of_jax_scipy():
    """`tol`, `atol`, `maxiter` and `M`: the same results as by our names, and not two values."""
    diagonal = lambda r: r / 4  # noqa: E731
    for solver in (wk.cg, wk.bicgstab):
        ours = {"tolerance": 1e-3, "absolute": 1e-4, "max_iterations": 60}
        theirs = {"tol": 1e-3, "atol": 1e-4, "maxiter": 60, "M": diagonal}
        a, b = (
            jax.jit(lambda b, s=solver, o=options: s(poisson(), b, **o))(B)
            for options in ({**ours, "preconditioner": diagonal}, theirs)
        )
        jax.tree.map(np.testing.assert_array_equal, a, b)
        with pytest.raises(ValueError, match="tolerance=0.01 and tol=0.1 name one keyword twice"):
            solver(poisson(), B, tolerance=0.01, tol=0.1)
    short = wk.jacobi(lambda u: 2 * u, B, diagonal=3.0, maxiter=3)
    assert int(short.iterations) == 3
    short = wk.multigrid(
        functools.partial(laplacian_at, boundary=odd),
        B,
        diagonal_at=lambda level: 4 / level**2,
        maxiter=1,
    )
    assert int(short.iterations) == 1


@pytest.mark.parametrize("solver", [wk.cg, wk.bicgstab])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"maxiter": "a"}, "maxiter='a' must be 1 or more, a whole number"),
        ({"maxiter": -1}, "maxiter=-1 must be 1 or more, a whole number"),
        ({"max_iterations": 2.5}, "max_iterations=2.5 must be 1 or more, a whole number"),
        ({"tol": "x"}, "tol='x' must be 0 or more, a number"),
        ({"M": 3}, "M=3 must be a function of fields"),
        ({"preconditioner": np.ones((99, 9))}, r"preconditioner=array.* must be a function of"),
    ],
)
def test_a_refusal_has_the_name_that_was_typed(solver, option, message):
    with pytest.raises(ValueError, match=f"^{solver.__name__}: {message}"):
        solver(poisson(), B, **option)


def test_limits_may_be_numbers_of_numpy_and_jax():
    limits: dict[str, Any] = dict(
        tolerance=np.float32(0), atol=jnp.float32(0), max_iterations=np.int64(2)
    )
    got = wk.jacobi(lambda u: 2 * u, B, diagonal=3.0, **limits)
    assert int(got.iterations) == 2


def test_jacobi_converges_where_the_diagonal_dominates():
    operator = lambda u: poisson()(u) + 4 * u  # noqa: E731
    got = jax.jit(lambda b: wk.jacobi(operator, b, diagonal=8.0))(B)
    want = scipy.sparse.linalg.spsolve(matrix(N) + 4 * sp.eye(N * N), np.float64(B).ravel())
    assert bool(got.converged)
    np.testing.assert_allclose(got.x.ravel(), want, atol=1e-4)


def laplacian_at(level, wafer=None, boundary="edge"):
    def update(u):
        return star(u, 0.0) / level**2

    return functools.partial(
        wk.stencil, update=update, radius=1, boundary=boundary, corners=False, wafer=wafer
    )


def odd(near):
    return -near


@pytest.mark.parametrize("size", [64, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_cycle_reduces_the_residual_equally_on_all_grids(size):
    """By 5.2 to 5.6 in the long run, within 10 % at any size; by more at first, on noise."""
    b = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), jnp.float32)
    at = functools.partial(laplacian_at, boundary=odd)
    cycle = wk.v_cycle(at, b.shape, diagonal_at=lambda level: 4 / level**2)

    @jax.jit
    def reductions(r):
        """The residual's reduction in each cycle; it is normalized before only rounding is left."""

        def step(r, _):
            left = r - at(1)(cycle(r))
            return left / jnp.linalg.norm(left), jnp.linalg.norm(left)

        return jax.lax.scan(step, r / jnp.linalg.norm(r), length=40)[1]

    by = 1 / np.asarray(reductions(b))
    assert by.min() > 5
    assert 5.1 < np.exp(np.log(by[20:]).mean()) < 5.6


def test_refuses_walls_that_differ_from_grid_to_grid():
    """Zero beyond the outermost cells; it converges if coarser grids keep the wall in its place."""
    diagonal = lambda level: 4 / level**2  # noqa: E731
    with pytest.raises(ValueError, match=r"operator_at\(2\) is a stencil with boundary='zero'"):
        wk.multigrid(functools.partial(laplacian_at, boundary="zero"), B, diagonal_at=diagonal)

    def hide_boundary(level):
        return lambda u: laplacian_at(level, boundary="zero")(u)

    def at_one_place(level):
        share = (level - 1) / (level + 1)
        return laplacian_at(level, boundary=lambda near: -share * near)

    b = jnp.tile(B, (2, 2))
    astray, got = (
        jax.jit(functools.partial(wk.multigrid, at, diagonal_at=diagonal, tolerance=1e-4))(b)
        for at in (hide_boundary, at_one_place)
    )
    assert "diverged" in astray.why and not bool(astray.converged)
    assert got.why == "converged" and int(got.iterations) <= 9
    assert true_residual(got.x, b) < 1.1e-4


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["2x4", "virtual-4x4"])
def test_multigrid_on_wafers_and_as_a_preconditioner(grid, wafer_called):
    at = functools.partial(laplacian_at, wafer=wafer_called(grid), boundary=odd)
    diagonal = lambda level: 4 / level**2  # noqa: E731

    @jax.jit
    def both(b):
        cycle = wk.v_cycle(at, b.shape, diagonal_at=diagonal)
        return (
            wk.multigrid(at, b, diagonal_at=diagonal),
            wk.cg(at(1), b, preconditioner=cycle),
        )

    alone, inside = both(B)
    assert bool(alone.converged) and bool(inside.converged)
    assert int(inside.iterations) <= int(alone.iterations)
    np.testing.assert_allclose(alone.x, inside.x, atol=1e-3)


@pytest.mark.parametrize("wind", [0.0, 0.3], ids=["cg", "bicgstab"])
def test_gradients_are_those_of_the_dense_solution(full_wafer, wind):
    """By `b`, and by what the operator reads; computed by a solve with the transpose."""
    n = 8
    b = B[:n, :n]

    def ours(b, wind):
        operator = functools.partial(
            wk.stencil,
            update=star,
            radius=1,
            corners=False,
            coefficients=wind,
            wafer=full_wafer,
        )
        solver = wk.cg if symmetric else wk.bicgstab
        return (solver(operator, b, tolerance=1e-7, max_iterations=100).x ** 2).sum()

    symmetric = wind == 0.0
    argnums = 0 if symmetric else (0, 1)
    got = jax.jit(jax.grad(ours, argnums))(b, jnp.float32(wind))
    plain, slope = (
        jnp.asarray(m.toarray(), jnp.float32) for m in (matrix(n), matrix(n, 1.0) - matrix(n))
    )

    def dense(b, wind):
        return (jnp.linalg.solve(plain + wind * slope, b.ravel()) ** 2).sum()

    want = jax.grad(dense, argnums)(b, jnp.float32(wind))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3)


def test_several_fields_and_sixteen_bits():
    """Two fields coupled; inner products of bfloat16 are summed in float32."""

    def couple(f):
        u, v = f["u"], f["v"]
        return {"u": 3 * u + v, "v": u + 2 * v}

    b = {"u": B, "v": -B}
    got = jax.jit(lambda b: wk.cg(couple, b))(b)
    assert int(got.iterations) <= 2
    np.testing.assert_allclose(3 * got.x["u"] + got.x["v"], B, atol=1e-4)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), b)
    rough = jax.jit(lambda b: wk.cg(couple, b, tolerance=2e-2))(low)
    assert rough.x["u"].dtype == jnp.bfloat16 and rough.residual.dtype == jnp.float32
    assert bool(rough.converged)


@pytest.mark.parametrize(
    ("solver", "boundary"), [(wk.cg, "edge"), (wk.bicgstab, "periodic")], ids=["cg", "bicgstab"]
)
def test_tells_an_inconsistent_system_from_a_consistent_one(solver, boundary):
    """Constants are mapped to zero: a right side has a solution if its mean is zero."""
    run = jax.jit(lambda b: solver(poisson(boundary=boundary), b, max_iterations=200))
    assert run(B - B.mean()).why == "converged"
    assert "inconsistent" in run(B + 0.5).why


@pytest.mark.parametrize("scale", [1.0, 1e16])
def test_an_ill_conditioned_system_is_not_called_singular(scale):
    """The ends of its spectrum are a factor of 27,000 apart."""
    neighbors = lambda u: jnp.pad(u[1:], (0, 1)) + jnp.pad(u[:-1], (1, 0))  # noqa: E731
    b = jnp.asarray(np.random.default_rng(0).standard_normal(256), jnp.float32)
    run = jax.jit(lambda b, scale: wk.bicgstab(lambda u: scale * (2 * u - neighbors(u)), b))
    assert "inconsistent" not in run(b, jnp.float32(scale)).why


def test_says_why_it_stopped():
    indefinite = lambda u: poisson()(u) - 2.1 * u  # noqa: E731
    assert "indefinite" in jax.jit(lambda b: wk.cg(indefinite, b))(B).why
    tight = jax.jit(lambda b: wk.cg(poisson(), b, tolerance=1e-10, max_iterations=300))(B)
    assert "stagnated" in tight.why and not bool(tight.converged)
    short = jax.jit(lambda b: wk.jacobi(lambda u: 2 * u, b, diagonal=3.0, max_iterations=3))(B)
    assert "most iterations" in short.why and int(short.iterations) == 3
    run = jax.jit(lambda b: wk.cg(lambda u: 2 * u, b))
    assert run(B.at[0, 0].set(jnp.nan)).why == "not finite"
    at_once = run(jnp.zeros((N, N)))
    assert int(at_once.iterations) == 0 and bool(at_once.converged)
    near = jax.jit(lambda b, x: wk.cg(poisson(), b, x))(B, tight.x)
    assert int(near.iterations) <= 1 and bool(near.converged)


def test_tolerances_may_be_traced():
    """And batched: each system ends where its own tolerance says."""
    solve = lambda tol, atol: wk.cg(poisson(), B, tol=tol, atol=atol)  # noqa: E731
    got = jax.jit(jax.vmap(solve))(jnp.asarray([1e-1, 1e-4, 1e-4]), jnp.asarray([0, 0, 1e2]))
    for lane, (tol, atol) in enumerate([(1e-1, 0.0), (1e-4, 0.0), (1e-4, 1e2)]):
        alone = jax.jit(solve)(tol, atol)
        assert int(got.iterations[lane]) == int(alone.iterations)
        np.testing.assert_allclose(got.x[lane], alone.x, atol=1e-4)
    assert int(got.iterations[0]) < int(got.iterations[1]) and int(got.iterations[2]) == 0
    assert not np.any(jax.grad(lambda tol: solve(tol, 0.0).x.sum())(1e-3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wk.cg(lambda u: u[1:], B), r"cg: operator\(b\) is float32\[15, 16\], it must be"),
        (lambda: wk.cg(lambda u: u, B, B[1:]), r"cg: x0 is float32\[15, 16\], it must be as b"),
        (lambda: wk.cg(lambda u: u, jnp.ones(3, jnp.int32)), "b is int32; cast it to a floating"),
        (lambda: wk.cg(lambda u: u, {}), "b holds no field"),
        (lambda: wk.cg(lambda u: u, [1.0, 2.0]), "b holds 1.0, which is no array; make b one"),
        (lambda: wk.cg(lambda u: u, B[:0]), r"shape \[0, 16\], which has no cells"),
        (lambda: wk.cg(lambda u: u, B + 1j), "b is complex64; solve for a pair of real fields"),
        (
            lambda: wk.cg(cast(Any, B), B),
            r"operator is a ArrayImpl; it must be a function of fields",
        ),
        (lambda: wk.cg(lambda u: None, B), r"operator\(b\) is PyTreeDef\(None\), b is"),
        (lambda: wk.cg(lambda u: u, B, 0.0), r"x0 is float32\[\], it must be as b"),
        (
            lambda: wk.cg(lambda u: u, B, M=lambda r: r[1:]),
            r"preconditioner\(b\) is float32\[15, 16\], it must be as b, float32\[16, 16\]",
        ),
        (
            lambda: wk.bicgstab(lambda u: u, B, M=lambda r: r.astype("float16")),
            r"bicgstab: preconditioner\(b\) is float16\[16, 16\], it must be as b",
        ),
        (
            lambda: jax.jit(lambda most: wk.cg(lambda u: u, B, maxiter=most))(3),
            "maxiter=.* must be 1 or more, a whole number that is not traced",
        ),
        (lambda: wk.cg(lambda u: u, B, maxiter=-1), "maxiter=-1 must be 1 or more"),
        (lambda: wk.jacobi(lambda u: u, B, diagonal=0.0), "diagonal=0.0 must be a finite number"),
        (
            lambda: wk.jacobi(lambda u: u, B, diagonal=jnp.ones(3)),
            r"diagonal is \[3\], which does not broadcast to b's \[16, 16\]",
        ),
        (
            lambda: wk.multigrid(laplacian_at, B, diagonal_at=cast(Any, 4.0)),
            "diagonal_at is a float; it must be a function of the level",
        ),
        (
            lambda: wk.multigrid(laplacian_at, B[0, 0], diagonal_at=lambda h: 4.0),
            r"b is \(\), whose sides cannot be halved",
        ),
        (
            lambda: wk.multigrid(laplacian_at, B, diagonal_at=lambda h: 4.0, sweeps=cast(Any, 2)),
            "sweeps=2 must be a pair of 1 or more",
        ),
        (lambda: wk.cg(lambda u: u, B, max_iterations=0), "max_iterations=0 must be 1 or more"),
        (
            lambda: wk.cg(lambda u: u, B, tolerance=-1),
            "cg: tolerance=-1 must be 0 or more, a number",
        ),
        (lambda: wk.cg(lambda u: u, B, atol=math.nan), "cg: atol=nan must be 0 or more, a number"),
        (
            lambda: wk.jacobi(lambda u: u, B, diagonal=1.0, damping=0),
            "damping=0 must be a number above 0",
        ),
        (
            lambda: wk.multigrid(laplacian_at, B[:15], diagonal_at=lambda h: 4.0),
            r"b is \(15, 16\), whose sides cannot be halved",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
