"""Solvers of systems whose numbers are far from 1: squares of them leave the range of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from wsekern.solvers import solution

B = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)


def laplacian(u, cell=1, wafer=None):
    """Zero on the faces of the outermost cells."""

    def update(v):
        around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
        return (4 * v[1:-1, 1:-1] - around) / cell**2

    return wk.stencil(u, update, radius=1, boundary=lambda near: -near, wafer=wafer)


def downwind(u):
    return laplacian(u) + 0.3 * (u - jnp.roll(u, 1, 0))


SOLVERS = {
    "cg": lambda a, b, **o: wk.cg(lambda u: a * laplacian(u), b, **o),
    "cg, preconditioned": lambda a, b, **o: wk.cg(
        lambda u: a * laplacian(u), b, preconditioner=lambda r: r / (4 * a), **o
    ),
    "bicgstab": lambda a, b, **o: wk.bicgstab(lambda u: a * downwind(u), b, **o),
    "bicgstab, preconditioned": lambda a, b, **o: wk.bicgstab(
        lambda u: a * downwind(u), b, preconditioner=lambda r: r / (4 * a), **o
    ),
    "jacobi": lambda a, b, **o: wk.jacobi(
        lambda u: a * (laplacian(u) + 4 * u), b, diagonal=8 * a, **o
    ),
    "multigrid": lambda a, b, **o: wk.multigrid(
        lambda level: lambda u: a * laplacian(u, level),
        b,
        diagonal_at=lambda level: a * 4 / level**2,
        **o,
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_power_of_two_changes_no_bit_of_the_solution(name):
    """Of the right side or of the operator, however large or small."""
    run = jax.jit(lambda a, b: SOLVERS[name](a, b))
    want = run(jnp.float32(1), B)
    assert bool(want.converged)
    for of_a, of_b in [(0, -80), (0, 64), (0, 110), (66, 0), (-66, 0), (66, 100), (-66, -100)]:
        got = run(jnp.float32(2.0**of_a), B * jnp.float32(2.0**of_b))
        np.testing.assert_array_equal(got.x, want.x * jnp.float32(2.0 ** (of_b - of_a)))
        np.testing.assert_array_equal(got.residuals, want.residuals * jnp.float32(2.0**of_b))
        assert int(got.iterations) == int(want.iterations) and bool(got.converged)


@pytest.mark.parametrize("grid", ["2x2", "virtual-4x4"])
def test_on_wafers(wafer_called, grid):
    """At the electron's charge, and where only the norm overflows."""
    operator = functools.partial(laplacian, wafer=wafer_called(grid))
    run = jax.jit(lambda b: (wk.cg(operator, b), wk.bicgstab(operator, b)))
    want = run(B)[0].x
    for scale in (1.6e-19, 1e37):
        for got in run(B * scale):
            np.testing.assert_allclose(np.float64(got.x) / scale, want, rtol=2e-4, atol=2e-5)
            assert bool(got.converged)


@pytest.mark.parametrize("name", ["cg", "bicgstab"])
def test_a_first_guess_changes_neither_units_nor_derivatives(name):
    """A guess that is nearly right leaves a small residual; what is differentiated is not small."""

    @jax.jit
    def run(b, weights, guess):
        solver = functools.partial(SOLVERS[name], jnp.float32(1), x0=guess)
        x, pull = jax.vjp(lambda b: solver(b).x, b)
        return solver(b), pull(weights)[0], jax.jvp(lambda b: solver(b).x, (b,), (weights,))[1]

    for scale in (1.0, 1e25, 1e-25):
        weights = jnp.cos(B) / scale
        cold, *want = run(B * scale, weights, 0 * B)
        most = int(cold.iterations)
        guesses = (cold.x * 1.0001, most - 2), (cold.x, 1), (B * scale * 3, 2 * most)
        for guess, most in guesses:
            got, *derivatives = run(B * scale, weights, guess)
            assert bool(got.converged) and int(got.iterations) <= most
            np.testing.assert_allclose(got.x / scale, cold.x / scale, atol=1e-3)
            for x, y in zip(derivatives, want, strict=True):
                assert np.any(x)
                np.testing.assert_allclose(x * scale, y * scale, atol=1e-3)


@pytest.mark.parametrize("name", ["cg", "bicgstab", "jacobi"])
def test_a_first_guess_far_away_is_no_worse_than_none(name):
    """A correction of it would be lost in rounding, and the residual that it carries says 0."""
    run = jax.jit(lambda a, b, guess: SOLVERS[name](a, b, x0=guess))
    for operator, scale in ((1.0, 1.0), (1e20, 1.0), (1.0, 1e-20)):
        want = run(jnp.float32(operator), B * scale, 0 * B)
        assert bool(want.converged)
        for size in (1e3, 1e6, 1e20, 1e37):
            got = run(jnp.float32(operator), B * scale, jnp.full_like(B, size))
            np.testing.assert_array_equal(got.x, want.x)
            assert bool(got.converged) and got.residual == want.residual


def test_a_first_guess_is_judged_with_its_correction():
    """The correction may be lost in the rounding of the sum."""
    scales = jnp.float32([1, 1e-9])
    got = jax.jit(lambda x0: wk.cg(lambda x: scales * x, jnp.ones(2), x0=x0))(
        jnp.float32([1, 1e9 * (1 + 1e-4)])
    )
    true = np.linalg.norm(1 - np.float64(scales) * np.float64(got.x))
    np.testing.assert_allclose(got.residual, true, rtol=0.1, atol=1e-7)
    assert bool(got.converged) == (true <= 1e-5 * np.sqrt(2))


def test_a_part_of_the_right_side_may_be_differentiated_alone():
    """JAX gives the other parts no derivative at all, rather than one of zeros."""
    operator = lambda f: {"u": 3 * f["u"], "v": 2 * f["v"]}  # noqa: E731
    for x0 in (None, {"u": B, "v": B}):
        total = lambda u, x0=x0: wk.cg(operator, {"u": u, "v": B}, x0).x["u"].sum()  # noqa: E731
        np.testing.assert_allclose(jax.jit(jax.grad(total))(B), np.full((8, 8), 1 / 3), rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_not_finite_has_no_solution(name):
    """Nor has its cotangent; the answer is NaN, which a gradient can tell, and not zeros."""
    solver = functools.partial(SOLVERS[name], jnp.float32(1))
    run = jax.jit(functools.partial(solver, absolute=1e30))
    pull = jax.jit(lambda weights: jax.vjp(lambda b: solver(b).x, B)[1](weights)[0])
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = B.at[3, 4].set(bad)
        got = run(spoiled)
        assert got.why == "not finite" and not bool(got.converged) and int(got.iterations) == 0
        assert np.isnan(got.x).all() and np.isnan(pull(spoiled)).all()
    zero = run(0 * B)
    assert zero.why == "converged" and not np.any(zero.x) and not np.any(pull(0 * B))
    if name != "multigrid":
        got = jax.jit(lambda b, x: solver(b, x0=x))(B, B.at[0, 0].set(np.nan))
        assert got.why == "not finite" and not bool(got.converged)


@pytest.mark.parametrize("solver", [wk.cg, wk.bicgstab])
def test_a_solution_beyond_the_dtype_has_not_converged(solver):
    run = jax.jit(lambda a, b: solver(lambda u: a * u, b))
    for a, b, x in ((1e-20, 1e25, np.inf), (1e20, 1e-25, 0)):
        got = run(jnp.float32(a), jnp.full((8, 8), b, jnp.float32))
        np.testing.assert_array_equal(got.x, np.full((8, 8), x))
        assert not bool(got.converged) and got.why != "converged"


def test_the_absolute_tolerance_is_in_the_units_of_the_right_side():
    run = jax.jit(lambda b: wk.cg(laplacian, b, tolerance=0.0, absolute=1e-22))
    for scale, most in ((1e-24, 0), (1e-20, 30)):
        got = run(B * scale)
        assert bool(got.converged) and int(got.iterations) <= most
        assert float(got.residual) <= 1e-22
        assert int(got.iterations) > 0 or not np.any(got.x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype):
    scales = {"bfloat16": (1e-30, 1e30), "float16": (3e-3, 3e3), "float64": (1e-250, 1e250)}
    with jax.enable_x64(dtype == "float64"):
        run = jax.jit(lambda b: wk.cg(lambda u: 2 * u, b, tolerance=2e-2))
        for scale in (1.0, *scales[dtype]):
            b = (np.asarray(B, np.float64) * scale).astype(jnp.dtype(dtype))
            got = run(jnp.asarray(b))
            assert got.x.dtype == dtype and bool(got.converged)
            np.testing.assert_allclose(
                np.float64(got.x), np.float64(b) / 2, rtol=2e-2, atol=1e-2 * scale
            )


@pytest.mark.parametrize("solver", [wk.cg, wk.bicgstab])
def test_any_right_side_with_any_operator_of_float32(solver):
    """To the ends of the range. Subnormal parts of b count, though processors read them as 0."""
    n = 16
    matrix = 3 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    run = jax.jit(lambda a, b: solver(lambda u: a * (3 * u - _neighbors(u)), b))
    values = np.random.default_rng(1).standard_normal(n)
    for of_a in (1e-37, 1e-36, 1e-20, 1.0, 1e20, 1e36):
        for of_b in (1e-37, 1e-30, 1.0, 1e30, 1e37):
            if not 1e-34 < of_b / of_a < 1e36:  # the solution's parts have to be in range too
                continue
            b = np.float32(values * of_b)
            got = run(jnp.float32(of_a), b)
            want = np.linalg.solve(matrix * float(np.float32(of_a)), np.float64(b))
            assert bool(got.converged), (of_a, of_b)
            np.testing.assert_allclose(got.x, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    subnormal = run(jnp.float32(1e-30), np.float32(values * 1e-39))
    assert bool(subnormal.converged) and np.all(np.asarray(subnormal.x))
    # x would be subnormal itself here, and zeros are no solution.
    assert not bool(run(jnp.float32(1), np.float32(values * 1e-40)).converged)


def _neighbors(u):
    return jnp.pad(u[1:], (0, 1)) + jnp.pad(u[:-1], (1, 0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("solver", [wk.cg, wk.bicgstab])
def test_sixteen_bits_neither_overflow_nor_end_in_nan(solver, dtype):
    """However long it goes on once rounding is all that is left of the residual."""
    n, eps = 64, float(jnp.finfo(dtype).eps)
    matrix = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    run = jax.jit(lambda a, b: solver(lambda u: a * (2 * u - _neighbors(u)), b))
    for of_a in (1 / 4096, 1.0, 4096.0, 16384.0):
        b = (of_a * np.cos(np.arange(n))).astype(dtype)
        got = run(jnp.asarray(of_a, dtype), b)
        residual = np.linalg.norm(of_a * matrix @ np.float64(got.x) - np.float64(b))
        assert residual < 10 * eps * np.linalg.norm(np.float64(b))
        np.testing.assert_allclose(got.residual, residual, rtol=0.5)
        assert got.why in ("converged", solution.REASONS[solution.STAGNATED])


def test_a_step_out_of_range_is_said_and_leaves_the_last_x():
    run = jax.jit(lambda b: wk.jacobi(lambda u: 4e3 * u, b, diagonal=1.0))
    got = run(B)
    assert got.why.startswith("diverged") and not bool(got.converged)
    assert np.isfinite(got.x).all() and np.isfinite(got.residual)
