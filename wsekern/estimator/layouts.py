"""How whole arrays outside kernels lie on the wafer, operation by operation, and what that moves.

A layout is known from the specs of the kernel that made the array, and is carried on from there.
An array whose layout is not known is assumed to be tiled: its last two dimensions over y and x if
they are long enough, else those that leave the busiest PE the fewest elements. An array of a few
elements is assumed to lie whole on every PE. What was only assumed gives way to what is known: no
array is laid out anew for a kernel or a product, unless its dimensions lie along exchanged axes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from wsekern.estimator import trace
from wsekern.estimator.cost import KNOWN, width_of
from wsekern.estimator.factorizations import place_of_operand
from wsekern.estimator.layout_rules import PROGRAMS, RULES, steps_on_a_tile
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.relayout import shift_move, tile_move
from wsekern.estimator.specs import (
    Spec,
    assumed_spec,
    from_partition_spec,
    is_coarser,
    is_small,
    is_transposed,
    part_count,
)
from wsekern.wafer.wafer import Wafer


class ResultLayout(NamedTuple):
    """How the results of an operation lie (None: not known), and the moves that making them takes.

    `assumed` says whether the layout follows from one that was assumed, and `program` what the
    moves do, where that is a choice among several ways.
    """

    spec: Spec | None
    moves: list[PricedMove]
    assumed: bool = False
    program: str = ""


def kernel_specs(equation: JaxprEqn, which: str) -> list[Spec]:
    """The layouts of a kernel's operands (`which="in_specs"`) or results (`which="out_specs"`)."""
    atoms: Sequence[Any] = equation.invars if which == "in_specs" else equation.outvars
    return [
        from_partition_spec(spec, len(atom.aval.shape))
        for spec, atom in zip(equation.params[which], atoms, strict=True)
    ]


def result_layout(
    equation: JaxprEqn,
    specs: Sequence[Spec | None],
    assumed: Sequence[bool],
    wafer: Wafer,
    static: Sequence[bool] | None = None,
) -> ResultLayout:
    """How the results of an equation lie, and the moves that making them takes.

    Args:
      equation: on whole arrays.
      specs: how each operand lies.
      assumed: whether each of these follows from one that was assumed.
      wafer: over which the arrays are spread.
      static: whether each operand is part of the program, which every PE has; by default none is.
    """
    name = equation.primitive.name
    if static is not None and (name not in RULES or name == "gather"):
        shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
        pairs = zip(specs, shapes, static, strict=True)
        specs = [((),) * len(shape) if fixed else spec for spec, shape, fixed in pairs]
        assumed = [a or fixed for a, fixed in zip(assumed, static, strict=True)]
    if not equation.outvars or not hasattr(equation.outvars[0].aval, "shape"):
        return ResultLayout(None, [])
    if wafer.size == 1:  # one PE has all of every array
        return ResultLayout(None, [], program=steps_on_a_tile(name))
    if name == "sharding_constraint":
        out: Any = equation.outvars[0].aval
        wanted = from_partition_spec(equation.params["sharding"].spec, len(out.shape))
        return ResultLayout(wanted, lay_out_as(out, specs[0], assumed[0], wanted, wafer))
    rule = RULES.get(name)
    if rule is None:
        return _elementwise(equation, specs, assumed, wafer)
    # The operand that is read elsewhere is the first one; a solution lies as its right side does.
    first = place_of_operand(name)
    spec, guessed = specs[first], specs[first] is None or assumed[first]
    if guessed and name == "concatenate":
        # The first part may be a rim; the whole says how its parts lie.
        whole: Any = equation.outvars[0].aval
        spec = assumed_spec(whole.shape, wafer)
    elif spec is None:
        operand: Any = equation.invars[first].aval
        spec = assumed_spec(operand.shape, wafer)
    new, moves, *program = rule(equation, spec, wafer)
    named = program[0] if any(program) else PROGRAMS.get(name, "") if guessed and moves else ""
    return ResultLayout(new, moves, guessed, named)


def largest_array(
    equation: JaxprEqn, specs: Sequence[Spec | None], result: Spec | None, wafer: Wafer
) -> tuple[tuple[int, ...], Spec | None]:
    """The shape of the largest operand or result of an operation, and how it lies.

    Args:
      equation: on whole arrays.
      specs: how each operand lies.
      result: how the results lie.
      wafer: over which the arrays are spread.
    """
    atoms = [*zip(equation.invars, specs, strict=True), *((v, result) for v in equation.outvars)]
    arrays = [(tuple(getattr(v.aval, "shape", ())), spec) for v, spec in atoms]
    # Of arrays of one size, that with a known layout, and of these the one that is cut most.
    shape, spec = max(
        arrays,
        key=lambda array: (
            math.prod(array[0]),
            0 if array[1] is None else part_count(array[1], wafer),
        ),
    )
    return shape, spec


def lay_out_as(
    aval: Any, spec: Spec | None, assumed: bool, wanted: Spec, wafer: Wafer
) -> list[PricedMove]:
    """The move of an array that lies as `spec` says to where `wanted` asks for it; or none."""
    if spec is None or (assumed and not is_transposed(spec, wanted)):
        return []
    return tile_move(aval, spec, wanted, wafer)


def _elementwise(
    equation: JaxprEqn, specs: Sequence[Spec | None], assumed: Sequence[bool], wafer: Wafer
) -> ResultLayout:
    """The result lies as the operand that is cut most; others are laid out like it.

    x + x.T, laid out P("y", "x") and P("x", "y")     is a relayout of one of the two
    x + mean, laid out P("y", "x") and P(None, "x")   is none: every PE has the mean that it needs
    x + row, laid out P("y", "x") and P(None, "y")    is a flood of the row
    """
    shape = equation.outvars[0].aval.shape  # type: ignore[attr-defined]
    arrays: dict[int, Any] = {
        i: v.aval
        for i, v in enumerate(equation.invars)
        if not trace.is_literal(v) and len(getattr(v.aval, "shape", ())) == len(shape)
    }
    same = [i for i, aval in arrays.items() if aval.shape == shape]
    repeated = {
        i: aval
        for i, aval in arrays.items()
        if i not in same and not is_small(aval.shape, wafer) and equation.primitive.name in KNOWN
    }
    known = {i: spec for i in same if (spec := specs[i]) is not None}
    if not known and not repeated:
        return ResultLayout(None, [])
    # An array whose layout was assumed, or is not known, is laid out like one whose layout is.
    firm = [spec for i, spec in known.items() if not assumed[i]]
    usual = assumed_spec(shape, wafer)
    if not firm and len(known) < max(1, len(same)):
        known |= {i: usual for i in same or [-1] if i not in known}
    target = max(firm or known.values(), key=lambda s: (part_count(s, wafer), s == usual))
    moves = []
    for i, spec in known.items():
        if not is_coarser(spec, target):
            gives_way = bool(firm) and assumed[i]
            moves += lay_out_as(arrays[i], spec, gives_way, target, wafer)
    for i, aval in repeated.items():
        kept = tuple(() if n == 1 else target[d] for d, n in enumerate(aval.shape))
        moves += tile_move(aval, specs[i] or assumed_spec(aval.shape, wafer), kept, wafer)
    return ResultLayout(
        target, moves, not firm, "a flood of its smaller operand" if repeated and moves else ""
    )


def order_kept(
    equation: JaxprEqn, operands: Sequence[Any], wafer: Wafer
) -> tuple[tuple[int, ...], Spec] | None:
    """How the reshaped operands of an operation lie, if it can work on them where they lie.

    So do operations on all elements alike, and sums of all: `x.ravel() * 2`, `x.ravel().max()`.

    Args:
      equation: on whole arrays.
      operands: what is known of them (`VariableState`).
      wafer: over which they are spread.
    """
    before = {v.before for v in operands if v.before is not None}
    if len(before) != 1 or not equation.outvars:
        return None
    name, out = equation.primitive.name, equation.outvars[0].aval
    rule, shape = RULES.get(name), getattr(out, "shape", ())
    whole = name.startswith(("reduce_", "arg")) and rule is not None and not shape
    if name == "sharding_constraint" or not (rule is None or whole):
        return None
    for atom, v in zip(equation.invars, operands, strict=True):
        own = getattr(atom.aval, "shape", ())
        repeated = not whole and math.prod(own) < math.prod(shape)
        fixed = (v.spec is not None or repeated) and not is_small(own, wafer)
        if fixed and v.before is None and not v.static:
            return None
    return before.pop()


def read_anywhere(equation: JaxprEqn) -> Collection[int]:
    """The places of operands whose elements an operation fetches, or sends, from anywhere.

    It moves as many words whether these were reshaped before or not.
    """
    name = equation.primitive.name
    if name in ("slice", "dynamic_slice"):
        source, out = (math.prod(v.aval.shape) for v in (equation.invars[0], equation.outvars[0]))  # type: ignore[attr-defined]
        return (0,) if 2 * out <= source else ()
    if name == "sort":
        flat = len(equation.outvars[0].aval.shape) == 1  # type: ignore[attr-defined]
        return range(len(equation.invars)) if flat else ()
    return (0, 1) if name == "gather" else (1, 2) if name.startswith("scatter") else ()


def shape_before_padding(
    equation: JaxprEqn, true_shape: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """The shape of a result without the cells that were added behind its operand's; None: its own.

    Args:
      equation: on whole arrays.
      true_shape: of its first operand, likewise.
    """
    operand: Any = equation.invars[0].aval
    name = equation.primitive.name
    if name == "convert_element_type":
        return true_shape
    if name != "pad" or any(
        low or between for low, _, between in equation.params["padding_config"]
    ):
        return None
    return true_shape or operand.shape


def rim_moves(equation: JaxprEqn, specs: Sequence[Spec | None], wafer: Wafer) -> list[PricedMove]:
    """The moves by which a convolution reads across the edges of tiles; none for a product.

    Args:
      equation: a contraction on whole arrays.
      specs: how each operand lies.
      wafer: over which the arrays are spread.
    """
    if equation.primitive.name != "conv_general_dilated":
        return []
    avals: list[Any] = [v.aval for v in equation.invars[:2]]
    image, kernel = avals
    numbers, dilation = equation.params["dimension_numbers"], equation.params["rhs_dilation"]
    spec = specs[0]
    if spec is None:
        # The places of an image, which it has more of than of anything else, lie over the PEs.
        places = numbers.lhs_spec[2:]
        sizes = [image.shape[d] if d in places else 1 for d in range(len(image.shape))]
        spec = assumed_spec(sizes, wafer)
    moves = [
        shift_move(image.shape, width_of(image), spec, d, (kernel.shape[k] - 1) * step, wafer)
        for d, k, step in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], dilation, strict=True)
    ]
    return [move for move in moves if move is not None]
