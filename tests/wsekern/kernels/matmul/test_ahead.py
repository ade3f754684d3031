"""On TPUs and GPUs the next tiles travel while those at hand are multiplied; tried on CPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from jaxprs import loops

import wsekern as wk
from wsekern.kernels.matmul import choice, stationary
from wsekern.kernels.matmul.problem import MatmulProblem

CASES = [
    ("cannon", "3x3"),
    ("cannon", "2x4"),
    ("mesh_gemm", "4x4"),
    ("2.5d", "2of2x2"),
    ("summa", "3x3"),
    ("summa", "4x2"),
    pytest.param("summa in pieces", "3x3", marks=pytest.mark.refuses),  # no algorithm for users
    ("collective", "2x4"),
    ("stationary", "2x4"),
]


@pytest.fixture
def as_on_chips(monkeypatch):
    """Plans what TPUs and GPUs are given, for CPU devices."""
    monkeypatch.setattr(MatmulProblem, "on_accelerators", property(lambda problem: True))
    monkeypatch.setattr(stationary, "_rounds", lambda problem: 2 * (problem.form != "tn") or 1)
    for name in ("summa", "collective"):
        price = choice.PRICES[name]
        field = {"summa": "pieces", "collective": "ahead"}[name]

        def in_pieces(problem, price=price, field=field):
            priced = price(problem)
            algorithm = dataclasses.replace(priced.plan.algorithm, **{field: True})
            plan = dataclasses.replace(priced.plan, algorithm=algorithm)
            return dataclasses.replace(priced, plan=plan)

        # `wk.matmul` looks the name up, so that both forms of SUMMA can be asked for.
        monkeypatch.setitem(choice.PRICES, f"{name} in pieces", in_pieces)
    monkeypatch.setitem(choice.PRICES, "collective", choice.PRICES["collective in pieces"])


def product(algorithm, wafer, form="nn"):
    transposed = {"transpose_a": form == "tn", "transpose_b": form == "nt"}
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer, **transposed)


@pytest.mark.parametrize("leading", [(), (2,)], ids=["matrix", "batch"])
@pytest.mark.parametrize(("algorithm", "grid"), CASES, ids=lambda value: value)
def test_products_and_gradients(algorithm, grid, leading, wafer_called, as_on_chips):
    if algorithm == "2.5d" and leading:
        pytest.skip("is for matrices that all wafers hold")
    rng = np.random.default_rng(0)
    shapes = (*leading, 8, 13), (13, 24), (*leading, 8, 24)
    a, b, dc = (rng.integers(-15, 16, shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def call(a, b, dc):
        c, pullback = jax.vjp(product(algorithm, wafer_called(grid)), a, b)
        return c, *pullback(dc)

    db = np.einsum("...mk,...mn->...kn", a, dc)
    want = a @ b, dc @ b.T, db.sum(tuple(range(len(leading))))
    for got, each in zip(call(a, b, dc), want, strict=True):
        np.testing.assert_array_equal(got, each)


@pytest.mark.parametrize("grid", ["2x4", "2of2x2"])
@pytest.mark.parametrize("form", ["nn", "nt"])
@pytest.mark.parametrize("shape", [(1, 12), (2, 5, 12)], ids=["a row", "a batch"])
def test_rows_that_do_not_divide_are_not_split(shape, form, grid, wafer_called, as_on_chips):
    """XLA's own program has every row on every PE along y, forward and backward."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-9, 10, s).astype(np.float32) for s in (shape, (12, 8)))
    dc, bias = rng.integers(-9, 10, (*shape[:-1], 8)).astype(np.float32), np.ones(8, np.float32)
    run = product("xla", wafer_called(grid), form)

    @jax.jit
    def call(a, b, bias, dc):
        c, pullback = jax.vjp(lambda a, b, bias: run(a, b, bias=bias), a, b, bias)
        return c, *pullback(dc)

    c, da, db, dbias = call(a, b.T if form == "nt" else b, bias, dc)
    np.testing.assert_array_equal(c, a @ b + 1)
    np.testing.assert_array_equal(da, dc @ b.T)
    want = np.einsum("...mk,...mn->...kn", a, dc)
    want = want.sum(0) if want.ndim > 2 else want
    np.testing.assert_array_equal(db.T if form == "nt" else db, want)
    np.testing.assert_array_equal(dbias, dc.reshape(-1, 8).sum(0))


@pytest.mark.parametrize("form", ["nn", "nt", "tn"])
@pytest.mark.parametrize(
    ("algorithm", "moves"),
    # The tiles of the first step, then as many steps; one factor may be skewed by its reflection.
    [
        ("cannon", 4),
        ("mesh_gemm", 4),
        pytest.param("summa in pieces", 8, marks=pytest.mark.refuses),
    ],
)
def test_a_square_sends_no_sums(algorithm, moves, form, wafer_called, as_on_chips):
    run = jax.jit(product(algorithm, wafer_called("2x2"), form))
    text = run.lower(jnp.ones((8, 8)), jnp.ones((8, 8))).as_text()
    reflects = form != "nn" and algorithm == "summa in pieces"
    assert text.count("stablehlo.collective_permute") == moves + reflects
    assert not any(name in text for name in ("all_reduce", "all_gather", "reduce_scatter"))


@pytest.mark.parametrize(("algorithm", "grid"), CASES, ids=lambda value: value)
def test_the_next_tiles_do_not_wait_for_a_product(algorithm, grid, wafer_called, as_on_chips):
    """In each step of a loop tiles are sent that need nothing of the product beside them."""
    run = product(algorithm, wafer_called(grid))
    jaxpr = jax.make_jaxpr(run)(jnp.ones((24, 48)), jnp.ones((48, 24))).jaxpr
    steps = [body for body, _ in loops(jaxpr) if "dot_general" in names(body)]
    assert steps
    for body in steps:
        arrive: set[Var] = set()
        products: set[Var] = set()
        for equation in body.eqns:
            needs = {v for v in equation.invars if isinstance(v, Var)}
            moves = equation.primitive.name in ("ppermute", "all_gather")
            if equation.primitive.name == "dot_general":
                assert not needs & arrive  # what it multiplies was there before the step
            if (moves and not needs & products) or needs & arrive:
                arrive.update(equation.outvars)
            if equation.primitive.name == "dot_general" or needs & products:
                products.update(equation.outvars)
        assert arrive


def names(body):
    return {equation.primitive.name for equation in body.eqns}
