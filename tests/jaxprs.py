"""What a traced program is made of, for tests of what kernels do step by step."""

from collections.abc import Iterator
from typing import Any

import jax


def loops(jaxpr: Any) -> Iterator[tuple[Any, int]]:
    """The bodies of all scans in a jaxpr, at whatever depth, and their lengths."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                inner = getattr(inner, "jaxpr", inner)
                if equation.primitive.name == "scan":
                    yield inner, equation.params["length"]
                yield from loops(inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
