"""Elements of whole arrays that data address: what gathers and scatters move outside kernels."""

from __future__ import annotations

from typing import Any

from jax.extend.core import JaxprEqn

from wsekern.estimator.cost import width_of
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.relayout import flood_move, move_anywhere, sum_move, words_of
from wsekern.estimator.specs import Spec, is_small
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.limits import gather_limit
from wsekern.wafer.wafer import Wafer

_BOTH = (ROWS, COLS)
# How the result lies, the moves, and, where there are several ways, the one that was chosen.
Rule = tuple[Spec | None, list[PricedMove]] | tuple[Spec | None, list[PricedMove], str]


def gather(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Elements come from where data say, the cheaper way of two.

    A request with the place of each slice crosses the wafer, and the slice comes back; or every PE
    gets the whole table, if it has room.
    """
    avals: list[Any] = [v.aval for v in equation.invars]
    table, indices = avals[:2]
    out: Any = equation.outvars[0].aval
    numbers = equation.params["dimension_numbers"]
    if not any(spec[d] for d in numbers.start_index_map):
        return None, *_flood_indices(indices, bool(numbers.operand_batching_dims), wafer)
    ways = {"requests and answers": move_anywhere(words_of(indices) + words_of(out), wafer)}
    if _fits(table, wafer) and (flood := flood_move(words_of(table), _BOTH, wafer)) is not None:
        ways["a flood of its table"] = flood
    return None, *_cheapest(ways)


def scatter(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> Rule:
    """Elements go where data say, the cheaper way of two.

    Each update crosses the wafer with its place; or every PE adds up its own updates to a table of
    its own, if it has room, and these tables are added up. A table that lies whole on every PE is
    always made in the second way.
    """
    avals: list[Any] = [v.aval for v in equation.invars]
    table, indices, updates = avals[:3]
    numbers = equation.params["dimension_numbers"]
    dims = numbers.scatter_dims_to_operand_dims
    # Every PE knows a few updates, and makes those of its own tile.
    if is_small(updates.shape, wafer) and is_small(indices.shape, wafer):
        return spec, []
    if any(spec) and not any(spec[d] for d in dims):
        return spec, *_flood_indices(indices, bool(numbers.operand_batching_dims), wafer)
    ways = {
        "updates sent to their places": move_anywhere(words_of(indices) + words_of(updates), wafer)
    }
    combines = equation.primitive.name != "scatter"
    if combines and _fits(table, wafer):
        total = sum_move(table.shape, width_of(table), _BOTH, 1, wafer)
        if total is not None:
            ways["a sum over the PEs"] = total
    return spec, *_cheapest(ways)


def _flood_indices(indices: Any, batched: bool, wafer: Wafer) -> tuple[list[PricedMove], str]:
    """The move by which every PE learns the places in its part of a table; none if it has its own.

    Args:
      indices: the array of places.
      batched: whether each row of the table has places of its own, which lie beside it.
      wafer: over which the table is spread.
    """
    if batched or is_small(indices.shape, wafer):
        return [], ""
    move = flood_move(words_of(indices), _BOTH, wafer)
    return ([], "") if move is None else ([move], "a flood of its indices")


def _fits(table: Any, wafer: Wafer) -> bool:
    return 4 * words_of(table) <= gather_limit(wafer)


def _cheapest(ways: dict[str, PricedMove]) -> tuple[list[PricedMove], str]:
    name = min(ways, key=lambda name: cycles_of(ways[name]))
    return [ways[name]], name


def cycles_of(move: PricedMove) -> float:
    return max(move.busy.values(), default=0.0) + move.latency
