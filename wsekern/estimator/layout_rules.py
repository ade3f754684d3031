"""What each operation on whole arrays moves, if its operand lies in a given way.

That is the first operand, and of a solve the right side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from wsekern.estimator import factorizations, trace
from wsekern.estimator.cost import width_of
from wsekern.estimator.indexing import Rule, cycles_of, gather, scatter
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.relayout import (
    flood_move,
    relayout_move,
    shift_move,
    sum_move,
    tile_move,
)
from wsekern.estimator.reshapes import spec_after_reshape
from wsekern.estimator.specs import (
    Spec,
    assumed_spec,
    is_coarser,
    occupied_pes,
    part_count,
    parts_along,
    tile_of,
)
from wsekern.wafer.wafer import Wafer


def _transpose(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    del wafer
    return tuple(spec[d] for d in equation.params["permutation"]), []


def _broadcast(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Every PE gets what its tile of the result repeats, from those that have it.

    v[4096] along ("y", "x") of 64 x 64 PEs to [4096, 4096], tiled: 64 cells for each column of PEs
    """
    new: list[tuple[str, ...]] = [()] * len(equation.params["shape"])
    for d, to in enumerate(equation.params["broadcast_dimensions"]):
        new[to] = spec[d]
    source: Any = equation.invars[0].aval
    out: Any = equation.outvars[0].aval
    target = assumed_spec(out.shape, wafer)
    kept = tuple(target[d] for d in equation.params["broadcast_dimensions"])
    if math.prod(out.shape) == math.prod(source.shape) or is_coarser(spec, kept):
        return tuple(new), []
    return target, tile_move(source, spec, kept, wafer)


def _squeeze(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    del wafer
    gone = equation.params["dimensions"]
    return tuple(entry for d, entry in enumerate(spec) if d not in gone), []


def _reduce(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    params = equation.params
    axes = params["axes"] if "axes" in params else params["dimensions"]
    kept = tuple(entry for d, entry in enumerate(spec) if d not in axes)
    move = _sum_over(equation, spec, axes, part_count(kept, wafer), wafer)
    return kept, [] if move is None else [move]


def _sum_over(
    equation: JaxprEqn, spec: Spec, dims: Sequence[int], parts: int, wafer: Wafer, words: int = 1
) -> PricedMove | None:
    """A reduction of the first operand over the PEs that split `dims`.

    Args:
      equation: whose operand lies as `spec` says.
      spec: likewise.
      dims: of the operand.
      parts: into how many parts the result is cut.
      wafer: over which it is spread.
      words: values for each element of the result.
    """
    source: Any = equation.invars[0].aval
    across = tuple(axis for d in dims for axis in spec[d])
    occupied: dict[str, int] = {}
    for d in dims:
        occupied |= occupied_pes(source.shape[d], spec[d], wafer)
    shape = [n for d, n in enumerate(source.shape) if d not in dims]
    return sum_move([*shape, words], width_of(source), across, parts, wafer, occupied)


def _cumulate(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """The sums of tiles are summed over the PEs; each PE then adds those before it to its own."""
    axis = equation.params["axis"]
    rest = tuple(() if d == axis else entry for d, entry in enumerate(spec))
    move = _sum_over(equation, spec, [axis], part_count(rest, wafer), wafer)
    return spec, [] if move is None else [move]


def _top_k(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Each PE takes the largest of its tile; the largest of two such lists go on to the next PE."""
    out: Any = equation.outvars[0].aval
    source: Any = equation.invars[0].aval
    d = equation.params.get("axis", equation.params.get("reduction_dimension", -1)) % len(spec)
    rest = tuple(() if e == d else entry for e, entry in enumerate(spec))
    if not spec[d]:
        return spec, []
    # A value and its place.
    move = _sum_over(equation, spec, [d], part_count(rest, wafer), wafer, 2 * out.shape[d])
    ways = [relayout_move(source, wafer)] + ([] if move is None else [move])
    return rest, [min(ways, key=cycles_of)]


def _tile(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    repeated = [d for d, times in enumerate(equation.params["reps"]) if times > 1]
    out: Any = equation.outvars[0].aval
    return spec, [relayout_move(out, wafer)] if any(spec[d] for d in repeated) else []


def _slice(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
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
) -> Rule:
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


def _split(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    moved = [v.aval for v in equation.outvars] if spec[equation.params["axis"]] else []
    return spec, [relayout_move(part, wafer) for part in moved]


def _unstack(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Each part lies on all PEs, or, if the parts lie on PEs of their own, is sent there."""
    axis = equation.params["axis"]
    moved = [v.aval for v in equation.outvars] if spec[axis] else []
    return spec[:axis] + spec[axis + 1 :], [relayout_move(part, wafer) for part in moved]


def _dynamic_slice(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Where the slice begins is not known; whole dimensions begin at 0."""
    source: Any = equation.invars[0].aval
    sizes = zip(source.shape, equation.params["slice_sizes"], spec, strict=True)
    if all(n == size or not entry for n, size, entry in sizes):
        return spec, []
    return spec, [relayout_move(equation.outvars[0].aval, wafer)]


def _dynamic_update(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    avals: list[Any] = [v.aval for v in equation.invars[:2]]
    whole, update = avals
    sizes = zip(whole.shape, update.shape, spec, strict=True)
    if all(n == size or not entry for n, size, entry in sizes):
        return spec, []
    return spec, [relayout_move(update, wafer)]


def _pad(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
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


def _concatenate(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
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


def _window(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """A window reads a rim of the next tile: its cells less one, along each dimension."""
    source: Any = equation.invars[0].aval
    moves = [
        shift_move(source.shape, width_of(source), spec, d, size - 1, wafer)
        for d, size in enumerate(equation.params["window_dimensions"])
        if size > 1
    ]
    return spec, [move for move in moves if move is not None]


def _fft(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Each transformed dimension that is split is made whole once, by laying the array out anew."""
    count = len(equation.params["fft_lengths"])
    out: Any = equation.outvars[0].aval
    return spec, [relayout_move(out, wafer) for entry in spec[len(spec) - count :] if entry]


def _sort(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    if not spec[equation.params["dimension"]]:
        return spec, []
    # Sorted tiles are split at common pivots, and every element goes to its PE.
    return spec, [relayout_move(v.aval, wafer) for v in equation.invars]


def _reverse(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    if not any(spec[d] for d in equation.params["dimensions"]):
        return spec, []
    return spec, [relayout_move(equation.outvars[0].aval, wafer)]


def _reshape(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    before: Any = equation.invars[0].aval
    after: Any = equation.outvars[0].aval
    new = spec_after_reshape(before.shape, after.shape, spec, wafer)
    return new, [relayout_move(after, wafer)] if new is None else []


def _factorize(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """In each step, PEs that have a part of the same matrix get the row that the step works with.

    Cholesky's factor of [1024, 1024] on 64 x 64 PEs   1024 floods of 16 words, one after another
    1000 matrices [4, 4], each on a PE of its own      no floods
    """
    name = equation.primitive.name
    operand: Any = equation.invars[factorizations.place_of_operand(name)].aval
    out: Any = equation.outvars[0].aval
    new = spec if out.shape == operand.shape else None
    steps, tile = factorizations.step_count(equation), tile_of(operand.shape, spec, wafer)
    # Where the unknowns run along x, a row of them is a column of the right side.
    rows = len(tile) - (1 if equation.params.get("left_side", True) is False else 2)
    words = math.prod(n for d, n in enumerate(tile) if d != rows) * width_of(operand) / 4
    flood = flood_move(words, {axis for entry in spec[-2:] for axis in entry}, wafer)
    if flood is None or not steps:
        return new, [], steps_on_a_tile(name)
    move = flood._replace(
        words=steps * flood.words,
        busy={way: steps * load for way, load in flood.busy.items()},
        latency=steps * flood.latency,
        hops=steps * flood.hops,
        tile=steps * flood.tile,
    )
    return new, [move], f"{factorizations.steps_term(name)}, each a flood of a row"


def steps_on_a_tile(name: str) -> str:
    """What a factorization is assumed to be that needs no other PEs; "" for other operations."""
    if name not in factorizations.FACTORIZATIONS:
        return ""
    return f"{factorizations.steps_term(name)} on a PE"


# Each is given an equation, how its operand lies, and the wafer.
RULES: Mapping[str, Callable[[JaxprEqn, Spec, Wafer], Rule]] = {
    "transpose": _transpose, "broadcast_in_dim": _broadcast, "squeeze": _squeeze,
    "reshape": _reshape, "rev": _reverse, "slice": _slice, "split": _split, "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update, "pad": _pad, "concatenate": _concatenate,
    "gather": gather, "sort": _sort, "fft": _fft, "tile": _tile,
    "top_k": _top_k, "approx_top_k": _top_k,
    "argmax": _reduce, "argmin": _reduce, "reduce": _reduce,
    "reduce_window": _window, "select_and_gather_add": _window,
    "select_and_scatter_add": _window, "select_and_scatter": _window,
} | {
    f"reduce_{kind}": _reduce for kind in ("sum", "max", "min", "prod", "and", "or", "xor")
} | {
    f"cum{kind}": _cumulate for kind in ("sum", "max", "min", "prod", "logsumexp")
} | {
    f"reduce_window_{kind}": _window for kind in ("sum", "max", "min")
} | {
    name: _factorize for name in factorizations.FACTORIZATIONS
} | {
    f"scatter{kind}": scatter
    for kind in ("", "-add", "-mul", "-min", "-max", "_add", "_mul", "_min", "_max", "-sub", "_sub")
}  # fmt: skip
# What the moves of these do follows from a layout that was assumed; reports say so.
PROGRAMS = {"reshape": "a relayout", "tile": "a relayout", "rev": "a relayout",
             "concatenate": "a relayout", "broadcast_in_dim": "a flood",
             "sort": "a relayout"}  # fmt: skip
