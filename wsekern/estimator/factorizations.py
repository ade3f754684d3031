"""Operations and steps of the factorizations of matrices, and of triangular and tridiagonal solves.

Counts are those of Golub and Van Loan, "Matrix Computations", 4th edition, 2013; each addition and
each product is one operation. JAX's own algorithms differ from machine to machine, and iterate.
Tridiagonal systems are solved by cyclic reduction: Zhang, Cohen and Owens, "Fast Tridiagonal
Solvers on the GPU", 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import JaxprEqn


def operation_count(equation: JaxprEqn) -> float:
    """The operations on all matrices of an equation that is one of `FACTORIZATIONS`."""
    name = equation.primitive.name
    operand: Any = equation.invars[place_of_operand(name)].aval
    matrix: Any = equation.invars[0].aval
    if name in _RIGHT_SIDES:
        each = 17 if name == "tridiagonal_solve" else matrix.shape[-1]
        return float(each * math.prod(operand.shape))
    *batch, m, n = matrix.shape
    long, short = max(m, n), min(m, n)
    return math.prod(batch) * _COUNTS[name](long, short)


def step_count(equation: JaxprEqn) -> int:
    """The steps, each of which needs the step before it."""
    matrix: Any = equation.invars[0].aval
    if equation.primitive.name == "tridiagonal_solve":
        return 2 * math.ceil(math.log2(max(2, matrix.shape[-1]))) - 1
    return min(matrix.shape[-2:])


def steps_term(name: str) -> str:
    """How many steps an operation takes, as reports say it."""
    return "2 log2 n steps" if name == "tridiagonal_solve" else "n steps"


def place_of_operand(name: str) -> int:
    """The place of the operand that says where an operation runs: of a solve, its right side."""
    return _RIGHT_SIDES.get(name, 0)


def _qr(m: int, n: int) -> float:
    return 2 * m * n**2 - 2 * n**3 / 3


def _lu(m: int, n: int) -> float:
    return m * n**2 - n**3 / 3


def _svd(m: int, n: int) -> float:
    # A tall matrix is reduced by a QR factorization first.
    return min(14 * m * n**2 + 8 * n**3, 6 * m * n**2 + 20 * n**3)


# For a matrix whose longer side is m and whose shorter side is n.
_COUNTS: Mapping[str, Callable[[int, int], float]] = {
    "cholesky": lambda m, n: n**3 / 3,
    "lu": _lu,
    "qr": _qr,
    "geqrf": _qr,
    "geqp3": _qr,
    "householder_product": _qr,  # of as many reflections as there are columns
    "eigh": lambda m, n: 9 * n**3,
    "svd": _svd,
    "eig": lambda m, n: 25 * n**3,  # with its vectors, as Schur's form with its own
    "schur": lambda m, n: 25 * n**3,
    "hessenberg": lambda m, n: 10 * n**3 / 3,
    "tridiagonal": lambda m, n: 4 * n**3 / 3,
}
_RIGHT_SIDES = {"triangular_solve": 1, "tridiagonal_solve": 3}  # their places among the operands
FACTORIZATIONS = _COUNTS.keys() | _RIGHT_SIDES.keys()
