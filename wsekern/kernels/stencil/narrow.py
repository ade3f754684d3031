"""A traced update for a smaller window, without another trace.

A jaxpr holds for one shape only. But if it consists of slices and of operations on single cells,
each cell of its result depends on the cells around it alone. Then the same equations, on fewer
cells, are the update of a smaller window. What jaxprs are, and how one is evaluated:
https://docs.jax.dev/en/latest/notebooks/Writing_custom_interpreters_in_Jax.html
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from wsekern.kernels.stencil.buffers import Pairs, Tile

# Each cell of the result is made of the operands' cells in the same place.
_CELL_BY_CELL = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or pcast pow pvary real reduce_precision rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
    """.split()
)
# These take away some dimensions; a cell of the result is made of all cells along them.
_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "squeeze"])
Box = Pairs  # some cells of a variable: begin and end along each dimension
Variable = Any  # a `core.Var` or a `core.Literal`, whose `aval` JAX types as one without a shape


def narrow(
    closed: core.ClosedJaxpr, types: Sequence[Any], shapes: Iterable[tuple[int, ...]]
) -> core.ClosedJaxpr | None:
    """The jaxpr that makes the first cells of each result from the first cells of each operand.

    Args:
      closed: the jaxpr of a larger window.
      types: of the smaller operands.
      shapes: of the smaller results.

    Returns:
      The jaxpr for operands of these types. None if the smaller operands lack cells that it needs,
      as they do for a sum over the window, or if it has effects, such as `jax.debug.print`.
    """
    wanted = [_first(shape) for shape in shapes]
    needs = _needs(closed.jaxpr, wanted)
    lacking = any(
        end > size
        for variable, operand in zip(closed.jaxpr.invars, types, strict=True)
        for (_, end), size in zip(needs.get(variable, ()), operand.shape, strict=False)
    )
    if lacking or closed.effects:
        return None

    def smaller(*operands: Tile) -> list[Tile]:
        cells = [_Cells(operand, _first(operand.shape)) for operand in operands]
        return [result.array for result in _evaluate(closed, cells, wanted) if result is not None]

    return jax.make_jaxpr(smaller)(*types)


class _Cells(NamedTuple):
    """The cells of a variable that were computed, and where they lie in all of it."""

    array: Tile
    box: Box

    def cut(self, box: Box) -> "_Cells":
        if box == self.box:
            return self
        pairs = [*zip(box, self.box, strict=True)]
        starts, ends = ([pair[i] - first for pair, (first, _) in pairs] for i in (0, 1))
        return _Cells(lax.slice(self.array, starts, ends), box)


def _first(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def _needs(jaxpr: core.Jaxpr, wanted: Sequence[Box | None]) -> dict[core.Var, Box]:
    """The smallest box of each variable with all cells that the `wanted` boxes depend on.

    For `f = u[1:] - u[:-1]; return f[1:] - f[:-1]` and the cells (0, 6) of the result:
    (0, 7) of `f`, and (0, 8) of `u`.
    """
    needs: dict[core.Var, Box] = {}

    def add(variables: Sequence[Variable], boxes: Sequence[Box | None]) -> None:
        for variable, box in zip(variables, boxes, strict=True):
            if box is not None and not _is_literal(variable):
                both = zip(box, needs.get(variable, box), strict=True)
                needs[variable] = tuple((min(a, c), max(b, d)) for (a, b), (c, d) in both)

    add(jaxpr.outvars, wanted)
    for equation in reversed(jaxpr.eqns):
        boxes = [needs.get(variable) for variable in equation.outvars]
        if any(box is not None for box in boxes):
            add(equation.invars, _operand_boxes(equation, boxes))
    return needs


def _operand_boxes(equation: core.JaxprEqn, boxes: Sequence[Box | None]) -> list[Box | None]:
    """The cells of each operand that an equation needs, to make `boxes` of its results."""
    name, params = equation.primitive.name, equation.params
    shapes, box = [_shape(variable) for variable in equation.invars], boxes[0]
    if name == "jit":
        inner = params["jaxpr"].jaxpr
        needs = _needs(inner, boxes)
        return [needs.get(variable) for variable in inner.invars]
    if box is None or not _follows(equation):
        return [_first(shape) for shape in shapes]
    if name == "slice":
        starts = params["start_indices"]
        return [tuple((a + s, b + s) for (a, b), s in zip(box, starts, strict=True))]
    if name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        return [tuple((0, 1) if n == 1 else box[d] for n, d in zip(shapes[0], dims, strict=True))]
    if name in _REDUCTIONS:
        gone = params["dimensions" if name == "squeeze" else "axes"]
        kept = iter(box)
        return [tuple((0, n) if d in gone else next(kept) for d, n in enumerate(shapes[0]))]
    if name == "transpose":
        return [tuple(box[params["permutation"].index(d)] for d in range(len(box)))]
    if name == "pad":
        padded = zip(box, shapes[0], params["padding_config"], strict=True)
        # Of a width that numpy made, an int.
        inside = [[_clip(end - int(low), n) for end in pair] for pair, n, (low, *_) in padded]
        return [tuple((begin, end) for begin, end in inside), ()]
    if name == "stack":
        axis = params["axis"]
        return [(*box[:axis], *box[axis + 1 :])] * len(shapes)
    if name == "concatenate":
        dim, offset, parts = params["dimension"], 0, []
        for shape in shapes:
            begin, end = (_clip(x - offset, shape[dim]) for x in box[dim])
            parts.append((*box[:dim], (begin, end), *box[dim + 1 :]) if begin < end else None)
            offset += shape[dim]
        return parts
    # A number stands for all cells, and so does a dimension of size 1 along it.
    return [
        tuple((0, 1) if n == 1 else pair for n, pair in zip(shape, box, strict=False))
        for shape in shapes
    ]


def _follows(equation: core.JaxprEqn) -> bool:
    """Whether it is known which cells of its operands an equation's result depends on."""
    name = equation.primitive.name
    if name == "slice":
        return set(equation.params["strides"] or [1]) == {1}
    if name in _CELL_BY_CELL:
        ranks = {len(_shape(variable)) for variable in equation.invars}
        return ranks <= {0, len(_shape(equation.outvars[0]))}
    if name == "pad":
        return all(between == 0 for *_, between in equation.params["padding_config"])
    return name in _REDUCTIONS or name in ("broadcast_in_dim", "concatenate", "stack", "transpose")


def _evaluate(
    closed: core.ClosedJaxpr, operands: Sequence[_Cells | None], wanted: Sequence[Box | None]
) -> list[_Cells | None]:
    """The `wanted` cells of the results; None for what nobody wants, and for what is not read."""
    jaxpr = closed.jaxpr
    needs = _needs(jaxpr, wanted)
    known: dict[core.Var, Any] = dict(zip(jaxpr.invars, operands, strict=True))
    for variable, constant in zip(jaxpr.constvars, closed.consts, strict=True):
        known[variable] = _Cells(constant, _first(_shape(variable)))

    def cells(variable: Variable, box: Box | None) -> _Cells | None:
        if box is None:
            return None
        return _Cells(variable.val, box) if _is_literal(variable) else known[variable].cut(box)

    for equation in jaxpr.eqns:
        boxes = [needs.get(variable) for variable in equation.outvars]
        if any(box is not None for box in boxes):
            reads = list(map(cells, equation.invars, _operand_boxes(equation, boxes)))
            results = _results(jaxpr, equation, reads, boxes)
            known |= zip(equation.outvars, results, strict=True)
    return [cells(variable, box) for variable, box in zip(jaxpr.outvars, wanted, strict=True)]


def _results(
    jaxpr: core.Jaxpr,
    equation: core.JaxprEqn,
    operands: Sequence[_Cells | None],
    boxes: Sequence[Box | None],
) -> Sequence[_Cells | None]:
    """The `boxes` of an equation's results, or all cells where it is not followed."""
    name, params, [box, *_] = equation.primitive.name, equation.params, boxes
    if name == "jit":
        return _evaluate(params["jaxpr"], operands, boxes)
    arrays = [operand.array for operand in operands if operand is not None]
    if box is None or not _follows(equation):
        # As a jaxpr of its own: only JAX knows how to evaluate a loop or a custom gradient.
        pairs = zip(equation.invars, arrays, strict=True)
        read = {v: array for v, array in pairs if not _is_literal(v)}
        alone = jaxpr.replace(
            constvars=[],
            invars=[*read],
            outvars=equation.outvars,
            eqns=[equation],
            debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*read.values())
        return [_Cells(array, _first(array.shape)) for array in results]
    if name == "slice":  # the operand's cells are cut already
        return [_Cells(arrays[0], box)]
    if name == "broadcast_in_dim":
        params = params | {"shape": tuple(end - begin for begin, end in box)}
    if name == "pad":
        [inside, _] = _operand_boxes(equation, boxes)
        there = zip(box, inside or (), params["padding_config"], strict=True)
        config = [(c + low - a, b - d - low, 0) for (a, b), (c, d), (low, *_) in there]
        params = {"padding_config": tuple(config)}
    if name == "stack":
        axis = params["axis"]
        box = (*box[:axis], (0, len(arrays)), *box[axis + 1 :])
    return [_Cells(equation.primitive.bind(*arrays, **params), box)]


def _clip(index: int, size: int) -> int:
    return min(max(index, 0), size)


def _shape(variable: Variable) -> tuple[int, ...]:
    return variable.aval.shape


def _is_literal(variable: Variable) -> bool:
    return hasattr(variable, "val")
