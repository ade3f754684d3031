"""Which algorithm serves a matrix product, what each would cost, and why `auto` takes one."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from wsekern.kernels.matmul import (
    allgather,
    cannon,
    overlapped,
    replicated,
    stationary,
    summa,
    tile,
    xla,
)
from wsekern.kernels.matmul.problem import MatmulPlan, MatmulProblem, PricedPlan
from wsekern.wafer.limits import gather_limit
from wsekern.wafer.wafer import Wafer

# Every algorithm by name: what plans it, and says what the plan costs.
PRICES: dict[str, Callable[[MatmulProblem], PricedPlan]] = {
    "allgather": allgather.price,
    "summa": summa.price,
    "cannon": cannon.price_cannon,
    "mesh_gemm": cannon.price_mesh_gemm,
    "collective": overlapped.price,
    "stationary": stationary.price,
    "2.5d": replicated.price,
    "xla": xla.price,
}
# "mesh" was the name of MeshGEMM, which a `jax.sharding.Mesh` has nothing to do with. The old name
# is accepted for one release.
_FORMER_NAMES = {"mesh": "mesh_gemm"}
_FEW_WORDS = 4  # a stationary factor pays if this many times fewer words move
_AT_LEAST = 0.95  # on accelerators, of the time of XLA's own program, to be taken before it
_LITTLE = 2**18  # bytes; gathering so few costs no more than the call itself


def find_algorithm(operation: str, algorithm: str) -> str:
    """The present name of an algorithm, or "auto".

    Raises:
      ValueError: the name is unknown.
    """
    name = _FORMER_NAMES.get(algorithm, algorithm)
    if name not in ("auto", *PRICES):
        known = ", ".join(repr(name) for name in ("auto", *PRICES))
        raise ValueError(f"{operation}: algorithm={algorithm!r} is not one of {known}")
    return name


def choose(operation: str, problem: MatmulProblem, name: str) -> tuple[PricedPlan, str]:
    """The plan of the algorithm of that name, or the one that "auto" takes, and why.

    Raises:
      ValueError: the algorithm cannot serve on the problem's wafer.
    """
    if name != "auto":
        priced = PRICES[name](problem)
        if priced.refused:
            raise ValueError(
                f"{operation}: algorithm={name!r} {priced.refused}; use one of "
                f"{serving(problem.wafer)}"
            )
        return priced, "asked for"
    if problem.on_accelerators:
        return _choose_on_accelerators([problem])
    return (_choose_on_devices if problem.wafer.machine is None else _choose_on_wafer)(problem)


def plan(operation: str, problem: MatmulProblem, name: str) -> tuple[MatmulPlan, MatmulPlan]:
    """The plans of a product and of its gradient; on accelerators "auto" takes each by itself.

    Raises:
      ValueError: the algorithm cannot serve on the problem's wafer.
    """
    forward = choose(operation, problem, name)[0].plan
    if name != "auto" or not (problem.on_accelerators and forward.splits_rows):
        return forward, forward
    forms = [form for form, *_ in tile.GRADIENTS[problem.form]]
    # Operands are laid out once, for both; the forward pass has padded rows that do not divide.
    rows = -(-problem.rows // problem.wafer.height) * problem.wafer.height
    problems = [dataclasses.replace(problem, form=form, rows=rows) for form in forms]
    backward = _choose_on_accelerators(problems)[0].plan
    unit = math.lcm(forward.unit, backward.unit)  # operands are padded once, for both
    return dataclasses.replace(forward, unit=unit), backward


def price_all(problem: MatmulProblem) -> dict[str, PricedPlan]:
    """Every algorithm by name, with its cost on the problem's wafer."""
    return {name: price(problem) for name, price in PRICES.items()}


def serving(wafer: Wafer) -> tuple[str, ...]:
    """The algorithms that serve the grid of `wafer`."""
    problem = MatmulProblem(
        rows=1, meeting=1, columns=1, x_bytes=4, y_bytes=4, s_bytes=4, wafer=wafer
    )
    return tuple(name for name, priced in price_all(problem).items() if not priced.refused)


def _choose_on_devices(problem: MatmulProblem) -> tuple[PricedPlan, str]:
    by_gathering, by_rows = allgather.price(problem), stationary.price(problem)
    # When very little moves, the fewest collectives are fastest, however many words they send.
    if problem.gathered_bytes > _LITTLE and _FEW_WORDS * by_rows.words <= by_gathering.words:
        return by_rows, "few rows: the large factor stays, and far fewer words move"
    if problem.gathers_little:
        return by_gathering, "what it gathers is little"
    if by_rows.rounds > 1:
        return by_rows, "a gather would be large; in rounds only a share of the rows is held"
    why = "a gather would be large, and the rows do not divide into rounds"
    return summa.price(problem), why


def _choose_on_accelerators(problems: Sequence[MatmulProblem]) -> tuple[PricedPlan, str]:
    """One algorithm for all of `problems`: the fastest, but XLA's own where none is faster."""

    def total(price: Callable[[MatmulProblem], PricedPlan]) -> float:
        priced = [price(problem) for problem in problems]
        unknown = any(p.refused or p.seconds is None for p in priced)
        return math.inf if unknown else sum(p.seconds or 0.0 for p in priced)

    first, by_itself = problems[0], total(xla.price)
    others = [stationary.price]
    # GPUs are left to XLA: there it has moves and products go on side by side by itself.
    if first.wafer.platform == "tpu":
        others.append(cannon.price_cannon)
    best = min(others, key=total)
    if total(best) >= _AT_LEAST * by_itself:
        return xla.price(first), "XLA's own program: no other is predicted to be faster"
    if best is stationary.price:
        return best(first), "few rows: the large factor stays, and far fewer words move"
    return best(first), "the fewest seconds: moves along both axes go on behind the products"


def _choose_on_wafer(problem: MatmulProblem) -> tuple[PricedPlan, str]:
    room = gather_limit(problem.wafer)
    usable = [priced for priced in price_all(problem).values() if not priced.refused]
    fitting = [priced for priced in usable if priced.held_bytes <= room]
    if not fitting:
        least = min(usable, key=lambda priced: priced.held_bytes)
        return least, f"none holds at most {room} bytes; it holds the least"
    best = min(fitting, key=lambda priced: priced.cycles or 0.0)
    return best, f"the fewest predicted cycles of those that hold at most {room} bytes"
