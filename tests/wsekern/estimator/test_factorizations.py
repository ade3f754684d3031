"""Factorizations, triangular solves and searches: published counts, and a flood for each step."""

import jax.numpy as jnp
import pytest
from estimating import array, estimate, wafer
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk

N, RIGHT = 64, 32
FLOODS = "n steps, each a flood of a row"


MATRIX = array(N, N)
PROGRAMS = {
    # The upper half is then filled with zeros.
    "cholesky": (lambda a: lax.linalg.cholesky(a, symmetrize_input=False), N**3 / 3 + N**2),
    "lu": (lambda a: lax.linalg.lu(a)[0], 2 * N**3 / 3),
    "qr": (lambda a: lax.linalg.qr(a)[1], 4 * N**3 / 3),
    "eigh": (lambda a: lax.linalg.eigh(a, symmetrize_input=False)[1], 9 * N**3),
    "svd": (lambda a: lax.linalg.svd(a)[0], 22 * N**3),
    "schur": (lambda a: lax.linalg.schur(a)[0], 25 * N**3),
    "hessenberg": (lambda a: lax.linalg.hessenberg(a)[0], 10 * N**3 / 3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_and_dependent_steps_count(name):
    """Each step takes at least its way to the farthest PE, and the start of an instruction."""
    program, flops = PROGRAMS[name]
    e = estimate(program, MATRIX)
    assert e.flops == pytest.approx(flops) and not e.unknown
    assert f"{name} as {FLOODS}" in e.assumed and FLOODS in str(e)
    assert e.words["E"] == N * N / 8  # a row's 8 words for each PE, N times
    work = flops / 2 / 64  # multiply-accumulates of a PE
    assert e.cycles > N * (7 + 7 + 14) + work
    # On one PE there are no floods, and all of the work.
    alone = wk.estimate(program, MATRIX, wafer=wafer(1, 1))
    assert not alone.moves and alone.cycles > 64 * work and alone.flops == pytest.approx(flops)
    assert f"{name} as n steps on a PE" in alone.assumed


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_triangular_solve_takes_a_step_for_each_unknown(left):
    solve = lambda a, b: lax.linalg.triangular_solve(a, b, left_side=left)  # noqa: E731
    e = estimate(solve, MATRIX, array(*((N, RIGHT) if left else (RIGHT, N))))
    assert e.flops == pytest.approx(N * N * RIGHT) and e.words["E"] == N * RIGHT / 8
    assert e.cycles > N * (7 + 7 + 14) and f"triangular_solve as {FLOODS}" in e.assumed


def test_a_tridiagonal_solve_takes_steps_by_the_logarithm_of_its_size():
    diagonal, right = array(4096), array(4096, RIGHT)
    e = estimate(lax.linalg.tridiagonal_solve, diagonal, diagonal, diagonal, right)
    assert e.flops == pytest.approx(17 * 4096 * RIGHT) and not e.unknown
    assert "tridiagonal_solve as 2 log2 n steps, each a flood of a row" in e.assumed
    assert e.cycles > (2 * 12 - 1) * (7 + 7 + 14)


def test_a_linear_solve_is_a_factorization_and_two_solves():
    e = estimate(jnp.linalg.solve, MATRIX, array(N))
    assert e.flops == pytest.approx(2 * N**3 / 3 + 2 * N * N, rel=0.1)
    assert {f"lu as {FLOODS}", f"triangular_solve as {FLOODS}"} <= e.assumed.keys()


def test_matrices_on_a_pe_of_their_own_flood_nothing():
    program, _ = PROGRAMS["lu"]
    e = estimate(program, array(640, 4, 4))
    assert not e.moves and e.flops == pytest.approx(640 * 2 * 4**3 / 3)
    assert "lu as n steps on a PE" in e.assumed
    w = wafer()
    tiled = w.map(program, in_specs=P("y", "x"), out_specs=P("y", "x"))
    e = wk.estimate(tiled, MATRIX, wafer=w)  # a tile of 8 x 8 on each PE
    assert not e.moves and e.flops == pytest.approx(64 * 2 * 8**3 / 3) and not e.unknown


@pytest.mark.parametrize("shape", [(0, 0), (3, 0, 0), (0, 4, 4), (2, 2)], ids=str)
def test_empty_and_tiny_matrices(shape):
    e = estimate(PROGRAMS["cholesky"][0], array(*shape))
    assert e.cycles >= 0 and not e.moves


def test_complex_matrices_take_four_products_for_one():
    real, complex_ = (estimate(PROGRAMS["lu"][0], array(N, N, dtype=d)) for d in ("f4", "c8"))
    assert complex_.flops == pytest.approx(4 * real.flops)
    assert complex_.words["E"] == 2 * real.words["E"]


def test_a_solution_lies_as_its_right_side():
    w = wafer()
    turned = w.map(lambda t: t * 2.0, in_specs=P("x", "y"), out_specs=P("x", "y"))
    solve = lambda a, b: turned(lax.linalg.triangular_solve(a, turned(b), left_side=True))  # noqa: E731
    e = wk.estimate(solve, MATRIX, MATRIX, wafer=w)
    assert {name for name, _, _ in e.by_operation} == {"mul", "flood", "triangular_solve"}


def test_a_search_reads_all_of_its_operand():
    """The largest few of each row take no less than the largest one."""
    rows = array(64, 8192)
    few, most = estimate(lambda x: lax.top_k(x, 8), rows), estimate(lambda x: x.max(-1), rows)
    assert few.cycles >= most.cycles and few.flops >= 64 * 8192


def test_a_sort_compares_every_element_log_times():
    e = estimate(lambda x: jnp.sort(x, -1), array(1024, 1024))
    assert e.flops == pytest.approx(1024 * 1024 * 10)
