"""Every public operation on the card, forward and gradient, against float32 on the host."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wsekern as wk
from benchmarks.on_card.cases import ALONE, ONE_PE, VIRTUAL, CheckedCall, cases
from benchmarks.on_card.row import Row
from benchmarks.on_card.session import Session
from wsekern.wafer.wafer import Wafer

# By dtype: of |result - reference| / |reference|, and of the worst element's error over its size
# plus the root mean square of all. bfloat16 has 8 bits: it rounds by up to 2**-9 = 0.2 %, and
# several roundings follow one another. On a CPU jnp's own gradients are up to 1.2 % off.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-1)}
_COST = 3.0  # seconds of a check: compile twice, run once
_MOST_THREADS = 8
_WAFERS: dict[str, Callable[[], Wafer | None]] = {
    ALONE: lambda: None,
    VIRTUAL: lambda: wk.Wafer.virtual(wk.WSE2, 2, 2),
    ONE_PE: lambda: wk.Wafer.devices(1, 1),
}


def run(session: Session) -> None:
    """Checks all cases without a wafer, then on virtual PEs, then some on a wafer of one PE.

    Compiling takes most of the time, so several checks run at once.
    """
    references: dict[tuple[str, str, str], list[np.ndarray]] = {}
    threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) // 2))
    checks = []
    for case, dtype, wafer in _choose(cases(session.small), session.small):
        parts = (case.operation, case.name, dtype, wafer)
        name = ", ".join(part for part in parts if part)
        checks.append((name, functools.partial(_check, name, case, dtype, wafer, references)))
    session.measure_together(checks, _COST, threads)


def _choose(
    all_cases: Sequence[CheckedCall], small: bool
) -> Iterator[tuple[CheckedCall, str, str]]:
    """What to check: a case, a dtype and a wafer.

    On a wafer of one PE the program is the one without a wafer, so one case of each operation is
    enough there; and where sizes are tiny, to try the program itself, everywhere.
    """
    for wafer in _WAFERS:
        seen: set[str] = set()
        for case in all_cases:
            if wafer not in case.wafers:
                continue
            is_first = case.operation not in seen
            seen.add(case.operation)
            if is_first or not (small or wafer == ONE_PE):
                few = small or wafer == ONE_PE
                yield from ((case, dtype, wafer) for dtype in case.dtypes[: 1 if few else None])


def _check(
    name: str,
    case: CheckedCall,
    dtype: str,
    wafer: str,
    references: dict[tuple[str, str, str], list[np.ndarray]],
) -> Iterator[Row]:
    """The row of one check; keeps its reference for the other wafers."""
    floats = tuple(i for i, x in enumerate(case.operands) if case.gradient and x.dtype.kind == "f")
    operands = [x.astype(jnp.dtype(dtype)) if x.dtype.kind == "f" else x for x in case.operands]
    shapes = jax.tree.leaves(jax.eval_shape(case.plain, *case.operands))
    rng = np.random.default_rng(1)
    cotangents = [rng.standard_normal(s.shape).astype(jnp.dtype(dtype)) for s in shapes]
    key = (case.operation, case.name, dtype)
    if key not in references:
        wide = [_widen(x) for x in operands]
        with jax.default_device(jax.devices("cpu")[0]):
            references[key] = _results(case.plain, wide, floats, [_widen(x) for x in cotangents])
    ours = functools.partial(case.ours, _WAFERS[wafer]())
    # A card multiplies float32 in fewer bits unless it is told not to.
    exact = jax.default_matmul_precision("highest")
    with exact if dtype == "float32" else contextlib.nullcontext():
        results = _results(ours, operands, floats, cotangents)
    yield _compare(name, case, dtype, results, references[key])


def _widen(x: np.ndarray) -> np.ndarray:
    return x if x.dtype.kind in "iub" else x.astype(np.float32)


def _results(
    function: Callable, operands: Sequence[Any], floats: tuple[int, ...], cotangents: Sequence[Any]
) -> list[np.ndarray]:
    """What `function` returns, and then the gradients of the operands `floats`."""

    @jax.jit
    def call(operands: Sequence[Any], cotangents: Sequence[Any]) -> list[jax.Array]:
        if not floats:
            return jax.tree.leaves(function(*operands))

        def of_floats(*values: Any) -> Any:
            placed = dict(zip(floats, values, strict=True))
            return function(*(placed.get(i, x) for i, x in enumerate(operands)))

        out, pull = jax.vjp(of_floats, *(operands[i] for i in floats))
        leaves, tree = jax.tree.flatten(out)
        cotangent = [c.astype(x.dtype) for c, x in zip(cotangents, leaves, strict=True)]
        return [*leaves, *pull(jax.tree.unflatten(tree, cotangent))]

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), call(operands, cotangents))
    return [np.asarray(x) for x in wide]


def _compare(
    name: str, case: CheckedCall, dtype: str, results: list[np.ndarray], reference: list[np.ndarray]
) -> Row:
    tolerance, of_worst = (case.factor * bound for bound in TOLERANCES[dtype])
    status, worst, notes = "done", 0.0, []
    count = len(reference) - sum(x.dtype.kind == "f" for x in case.operands) * case.gradient
    for i, (got, want) in enumerate(zip(results, reference, strict=True)):
        error, element = _errors(got, want)
        # Of NaN nothing is true.
        if not (error <= tolerance and element <= of_worst):
            status = "failed"
            part = f"result {i}" if i < count else f"gradient {i - count}"
            notes.append(f"{part}: error {error:.1e}, of one element {element:.1e}")
        worst = error if not error <= worst else worst
    return Row(
        measurement=name,
        candidate=case.operation,
        status=status,  # type: ignore[arg-type]
        error=float(worst),
        tolerance=tolerance,
        note="; ".join(notes),
    )


def _errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """The error of all in norm, and of the worst element."""
    if got.shape != want.shape:
        return np.inf, np.inf
    exact = np.float64(want)
    apart = np.abs(got - exact)
    size = float(np.sqrt(np.mean(exact**2)) + np.finfo(np.float32).tiny)
    return float(np.sqrt(np.mean(apart**2))) / size, float(np.max(apart / (np.abs(exact) + size)))
