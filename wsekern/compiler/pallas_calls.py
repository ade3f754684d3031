"""The FLOPs of a program's Pallas kernels, read off its trace: XLA does not look into them."""

from __future__ import annotations

import math
from typing import Any

from wsekern.estimator.trace import inner_jaxpr


def flops_by_kernel(jaxpr: Any) -> dict[str, float]:
    """The FLOPs of one call of each Pallas kernel, by its name.

    What the kernel says of itself (`cost_estimate`), else the products of its body in every place
    of its grid, where blocks that a mask lets it skip are counted too.
    """
    found: dict[str, float] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            name, flops = _kernel(equation.params)
            found[name] = max(flops, found.get(name, 0.0))
            continue
        for inner in _inner(equation.params):
            for name, flops in flops_by_kernel(inner).items():
                found[name] = max(flops, found.get(name, 0.0))
    return found


def _kernel(params: dict[str, Any]) -> tuple[str, float]:
    source = params.get("name_and_src_info")
    name = getattr(source, "name", None) or params.get("name") or "kernel"
    stated: Any = params.get("cost_estimate")
    if stated is not None and stated.flops:
        return name, float(stated.flops)
    grid: Any = params["grid_mapping"].grid
    places = math.prod(side if isinstance(side, int) else 1 for side in grid)
    return name, places * _flops(_open(params["jaxpr"]))


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            meeting = math.prod(shape[axis] for axis in left)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * meeting
        elif name == "cond":
            total += max((_flops(branch) for branch in _inner(params)), default=0.0)
        else:
            trips = params.get("length", 1) if name == "scan" else 1
            total += trips * sum(_flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs that an equation calls: a loop's body, every branch of a conditional."""
    branches = params.get("branches")
    if branches is not None:
        return [_open(branch) for branch in branches]
    bodies = [params[key] for key in ("body_jaxpr", "fun_jaxpr") if key in params]
    inner = inner_jaxpr(params)
    if inner is not None and not bodies:
        bodies = [inner]
    return [_open(body) for body in bodies]


def _open(jaxpr: Any) -> Any:
    """A jaxpr without the values of its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)
