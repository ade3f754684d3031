"""How whole arrays outside kernels lie on the wafer, operation by operation, and what that moves.

A layout is known from the specs of the kernel that made the array, and is carried on from there.
An array whose layout is not known lies as it is needed, until an operation reads other cells than
those where its result lies: a slice, a sum, a sort. Such an array is then assumed to be tiled: its
last two dimensions over y and x if they are long enough, else its longest one over both. An array
with fewer elements than the wafer has PEs is assumed to lie whole on every PE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from wsekern.estimator import trace
from wsekern.estimator.cost import width_of
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.relayout import (
    Spec,
    parts_along,
    relayout_move,
    shift_move,
    sum_move,
)
from wsekern.estimator.reshapes import spec_after_reshape
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer


class ResultLayout(NamedTuple):
    """How the results of an operation lie (None: not known), and the moves that making them takes.

    `assumed` says whether the layout follows from one that was assumed.
    """

    spec: Spec | None
    moves: list[PricedMove]
    assumed: bool = False


def kernel_specs(equation: JaxprEqn, which: str) -> list[Spec]:
    """The layouts of a kernel's operands (`which="in_specs"`) or results (`which="out_specs"`)."""
    atoms: Sequence[Any] = equation.invars if which == "in_specs" else equation.outvars
    return [
        _from_partition_spec(spec, len(atom.aval.shape))
        for spec, atom in zip(equation.params[which], atoms, strict=True)
    ]


def part_count(spec: Spec | None, wafer: Wafer) -> int:
    """Into how many parts an array is cut; evenly over all PEs if its layout is not known."""
    return wafer.size if spec is None else math.prod(parts_along(axes, wafer) for axes in spec)


def assumed_spec(shape: Sequence[int], wafer: Wafer) -> Spec:
    """How an array is assumed to lie whose layout is not known."""
    spec: list[tuple[str, ...]] = [()] * len(shape)
    if math.prod(shape) < wafer.height * wafer.width:
        return tuple(spec)
    if len(shape) > 1 and shape[-2] >= wafer.height and shape[-1] >= wafer.width:
        spec[-2:] = (ROWS,), (COLS,)
    else:
        spec[max(range(len(shape)), key=lambda d: shape[d])] = (ROWS, COLS)
    return tuple(spec)


def result_layout(
    equation: JaxprEqn, specs: Sequence[Spec | None], assumed: Sequence[bool], wafer: Wafer
) -> ResultLayout:
    """How the results of an equation lie, and the moves that making them takes.

    Args:
      equation: on whole arrays.
      specs: how each operand lies.
      assumed: whether each of these follows from one that was assumed.
      wafer: over which the arrays are spread.
    """
    name = equation.primitive.name
    if not equation.outvars or not hasattr(equation.outvars[0].aval, "shape"):
        return ResultLayout(None, [])
    first = next((i for i, spec in enumerate(specs) if spec is not None), None)
    if name == "sharding_constraint":
        out: Any = equation.outvars[0].aval
        wanted = _from_partition_spec(equation.params["sharding"].spec, len(out.shape))
        moves = [] if specs[0] in (None, wanted) else [relayout_move(out, wafer)]
        return ResultLayout(wanted, moves)
    # What only describes an array anew moves nothing, however the array lies.
    if first is None and name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return ResultLayout(None, [])
    rule = _RULES.get(name)
    if rule is None:
        return _elementwise(equation, specs, assumed, wafer)
    # The operand that is read elsewhere is the first one.
    spec = specs[0]
    if spec is None:
        # The first part of a concatenation may be a rim; the whole says how its parts lie.
        whole: Any = (equation.outvars if name == "concatenate" else equation.invars)[0].aval
        spec = assumed_spec(whole.shape, wafer)
    guessed = specs[0] is None or assumed[0]
    new, moves = rule(equation, spec, wafer)
    return ResultLayout(new if name == "transpose" or not guessed else None, moves, guessed)


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


def _elementwise(
    equation: JaxprEqn, specs: Sequence[Spec | None], assumed: Sequence[bool], wafer: Wafer
) -> ResultLayout:
    """The result lies as the operand that is cut most; others of its shape are laid out like it.

    x + x.T, laid out P("y", "x") and P("x", "y")     is a relayout of one of the two
    x + mean, laid out P("y", "x") and P("y", None)   is not: every PE has the mean that it needs
    """
    shape = equation.outvars[0].aval.shape  # type: ignore[attr-defined]
    same = [
        i
        for i, v in enumerate(equation.invars)
        if getattr(v.aval, "shape", None) == shape and not trace.is_literal(v)
    ]
    known = [i for i in same if specs[i] is not None]
    if not known:
        return ResultLayout(None, [])
    # Beside an array whose layout was assumed, another one of its size is assumed to be tiled too.
    specs = list(specs)
    guessed = all(assumed[i] for i in known)
    if guessed and math.prod(shape) >= wafer.size:
        for i in same:
            specs[i] = assumed_spec(shape, wafer) if specs[i] is None else specs[i]
    most = max(same, key=lambda i: -1 if specs[i] is None else part_count(specs[i], wafer))
    target = specs[most]
    assert target is not None
    moves = [
        relayout_move(equation.invars[i].aval, wafer)
        for i in same
        if (spec := specs[i]) is not None and not _is_coarser(spec, target)
    ]
    return ResultLayout(target, moves, guessed)


def _is_coarser(spec: Spec, target: Spec) -> bool:
    """Whether every PE has, under `spec`, what it needs under `target`."""
    return all(set(a) <= set(b) for a, b in zip(spec, target, strict=True))


_Rule = tuple[Spec | None, list[PricedMove]]


def _transpose(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    del wafer
    return tuple(spec[d] for d in equation.params["permutation"]), []


def _broadcast(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    del wafer
    new: list[tuple[str, ...]] = [()] * len(equation.params["shape"])
    for d, to in enumerate(equation.params["broadcast_dimensions"]):
        new[to] = spec[d]
    return tuple(new), []


def _squeeze(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    del wafer
    gone = equation.params["dimensions"]
    return tuple(entry for d, entry in enumerate(spec) if d not in gone), []


def _reduce(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    axes = equation.params["axes"]
    kept = tuple(entry for d, entry in enumerate(spec) if d not in axes)
    across = tuple(axis for d in axes for axis in spec[d])
    out: Any = equation.outvars[0].aval
    move = sum_move(out.shape, width_of(out), across, part_count(kept, wafer), wafer)
    return kept, [] if move is None else [move]


def _cumulate(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """The sums of tiles are summed over the PEs; each PE then adds those before it to its own."""
    axis = equation.params["axis"]
    out: Any = equation.outvars[0].aval
    shape = [1 if d == axis else n for d, n in enumerate(out.shape)]
    rest = tuple(() if d == axis else entry for d, entry in enumerate(spec))
    move = sum_move(shape, width_of(out), spec[axis], part_count(rest, wafer), wafer)
    return spec, [] if move is None else [move]


def _slice(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """A rim that is left out shifts the others; a part of the array is laid out anew.

    u[2:] of 1000 cells, 10 on a PE     every PE gets two cells of the next one
    u[500:]                             half of the PEs have it, and all are to work on it
    u[::2]                              likewise
    """
    params = equation.params
    source: Any = equation.invars[0].aval
    strides = params["strides"] or (1,) * len(source.shape)
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    cut = [(a, n - b, k) for n, (a, b, k) in zip(source.shape, cuts, strict=True)]
    return _take(equation, spec, cut, wafer)


def _take(
    equation: JaxprEqn, spec: Spec, cuts: Sequence[tuple[int, int, int]], wafer: Wafer
) -> _Rule:
    """The layout after cutting (cells in front, cells behind, stride) off each dimension."""
    source: Any = equation.invars[0].aval
    moves = []
    for d, (front, behind, stride) in enumerate(cuts):
        tile = -(-source.shape[d] // parts_along(spec[d], wafer))
        if not spec[d] or not (front or behind or stride > 1):
            continue
        # A dimension with a cell on each PE may still lose a rim of a few.
        if stride > 1 or max(front, behind) > max(tile, source.shape[d] // 8):
            return spec, [relayout_move(equation.outvars[0].aval, wafer)]
        moves.append(shift_move(source.shape, width_of(source), spec, d, front, wafer))
    return spec, [move for move in moves if move is not None]


def _split(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    moved = [v.aval for v in equation.outvars] if spec[equation.params["axis"]] else []
    return spec, [relayout_move(part, wafer) for part in moved]


def _dynamic_slice(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """Where the slice begins is not known; whole dimensions begin at 0."""
    source: Any = equation.invars[0].aval
    sizes = zip(source.shape, equation.params["slice_sizes"], spec, strict=True)
    if all(n == size or not entry for n, size, entry in sizes):
        return spec, []
    return spec, [relayout_move(equation.outvars[0].aval, wafer)]


def _dynamic_update(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    avals: list[Any] = [v.aval for v in equation.invars[:2]]
    whole, update = avals
    sizes = zip(whole.shape, update.shape, spec, strict=True)
    if all(n == size or not entry for n, size, entry in sizes):
        return spec, []
    return spec, [relayout_move(update, wafer)]


def _pad(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    config = equation.params["padding_config"]
    source: Any = equation.invars[0].aval
    moves = []
    for d, (low, high, between) in enumerate(config):
        if not spec[d]:
            continue
        # Cells that are added behind the others, as to fill up tiles, move none of them.
        if between or abs(low) > source.shape[d] // 8 or -high > source.shape[d] // 8:
            return spec, [relayout_move(source, wafer)]
        moves.append(shift_move(source.shape, width_of(source), spec, d, -low, wafer))
    return spec, [move for move in moves if move is not None]


def _concatenate(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """An operand that is most of the result moves by its place in it; others are laid out anew."""
    d = equation.params["dimension"]
    if not spec[d]:
        return spec, []
    out: Any = equation.outvars[0].aval
    moves, place = [], 0
    for atom in equation.invars:
        part: Any = atom.aval
        if part.shape[d] > 7 * out.shape[d] // 8:
            move = shift_move(out.shape, width_of(out), spec, d, -place, wafer)
            moves += [] if move is None else [move]
        elif not trace.is_literal(atom):
            moves.append(relayout_move(part, wafer))
        place += part.shape[d]
    return spec, moves


def _window(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """A window reads a rim of the next tile: its cells less one, along each dimension."""
    source: Any = equation.invars[0].aval
    moves = [
        shift_move(source.shape, width_of(source), spec, d, size - 1, wafer)
        for d, size in enumerate(equation.params["window_dimensions"])
        if size > 1
    ]
    return spec, [move for move in moves if move is not None]


def _elsewhere(of: int | None) -> Callable[[JaxprEqn, Spec, Wafer], _Rule]:
    """Elements go where data say: an operand (None: the result) crosses the wafer once."""

    def rule(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
        if not any(spec):
            return None, []
        moved: Any = equation.outvars[0].aval if of is None else equation.invars[of].aval
        return None if of is None else spec, [relayout_move(moved, wafer)]

    return rule


def _fft(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    """Each transformed dimension that is split is made whole once, by laying the array out anew."""
    count = len(equation.params["fft_lengths"])
    out: Any = equation.outvars[0].aval
    return spec, [relayout_move(out, wafer) for entry in spec[len(spec) - count :] if entry]


def _sort(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    if not spec[equation.params["dimension"]]:
        return spec, []
    # Sorted tiles are split at common pivots, and every element goes to its PE.
    return spec, [relayout_move(v.aval, wafer) for v in equation.invars]


def _reverse(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    if not any(spec[d] for d in equation.params["dimensions"]):
        return spec, []
    return spec, [relayout_move(equation.outvars[0].aval, wafer)]


def _reshape(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> _Rule:
    before: Any = equation.invars[0].aval
    after: Any = equation.outvars[0].aval
    new = spec_after_reshape(before.shape, after.shape, spec, wafer)
    return new, [relayout_move(after, wafer)] if new is None else []


def _from_partition_spec(spec: Any, ndim: int) -> Spec:
    # P("y") of a 3-dimensional array leaves out the dimensions that are not split.
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + ((),) * (ndim - len(entries))


_RULES: dict[str, Callable[[JaxprEqn, Spec, Wafer], _Rule]] = {
    "transpose": _transpose, "broadcast_in_dim": _broadcast, "squeeze": _squeeze,
    "reshape": _reshape, "rev": _reverse, "slice": _slice, "split": _split,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update, "pad": _pad, "concatenate": _concatenate,
    "gather": _elsewhere(None), "sort": _sort, "fft": _fft, "top_k": _elsewhere(0),
    "argmax": _reduce, "argmin": _reduce,
    "reduce_window": _window, "select_and_gather_add": _window,
} | {
    f"reduce_{kind}": _reduce for kind in ("sum", "max", "min", "prod", "and", "or", "xor")
} | {
    f"cum{kind}": _cumulate for kind in ("sum", "max", "min", "prod", "logsumexp")
} | {
    f"reduce_window_{kind}": _window for kind in ("sum", "max", "min")
} | {
    f"scatter{kind}": _elsewhere(2)
    for kind in ("", "-add", "-mul", "-min", "-max", "_add", "_mul", "_min", "_max", "-sub")
}  # fmt: skip
