"""Matrix product of few rows: the large factor stays, rows and results move.

R. Pope et al., "Efficiently Scaling Transformer Inference", 2022, call it weight-stationary. X and
S have few rows and Y is large (a weight). A PE's tile of Y meets a part of X's columns, in all
rows. That part lies along x, so rows are first gathered along y, and then the part is flooded along
x by the PEs that have it. On a square grid of devices the tiles are mirrored across its diagonal
first, and rows are gathered along x instead (`mirrored`): that saves the flood.

Many rows go in rounds, each with the same share of every tile's rows.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from wsekern import fabric
from wsekern.kernels.matmul import panels, steps, summa, tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS

_ROUND_ROWS = 1024  # with fewer rows, a product runs at a lower rate on a CPU
_FEWEST_ROWS = 512  # of a round, if there are only two


def price(problem: MatmulProblem) -> PricedPlan:
    """(h - 1) X + M K / h + (h - 1) S words in 3 steps a round; M K / w and M K / h are held."""
    h, w = problem.wafer.height, problem.wafer.width
    rounds, mirrored = _rounds(problem), h == w and problem.wafer.machine is None
    met = problem.x_copies * problem.rows * -(-problem.meeting // h) * problem.x_bytes
    gathered = problem.x_copies * problem.rows * -(-problem.meeting // w) * problem.x_bytes
    return problem.price(
        MatmulPlan(
            name="stationary",
            algorithm=Stationary(
                rows=problem.rows,
                rounds=rounds,
                mirrored=mirrored,
                ahead=problem.on_accelerators,
            ),
            joins=not (problem.on_accelerators and problem.wafer.platform == "tpu"),
        ),
        words=_bytes_moved(problem, met, mirrored) / WORD_BYTES,
        steps=3 * rounds,
        hops=(2 * h + w) * rounds,
        held_bytes=(gathered + met) / rounds,
        overlaps=False,  # nothing is multiplied before all is there
        rounds=rounds,
        note=f"in {rounds} rounds" if rounds > 1 else "",
    )


def _rounds(problem: MatmulProblem) -> int:
    """How many shares the rows of a tile are best cut into; 1 if no number near it divides them."""
    wafer = problem.wafer
    if problem.form == "tn" or wafer.machine is not None or problem.gathers_little:
        return 1
    tall = -(-problem.rows // wafer.height)
    rows = problem.x_copies * tall * wafer.height
    wanted = max(rows // _ROUND_ROWS, min(rows // _FEWEST_ROWS, 2))
    # Rounds must divide the rows. Up to twice as many rows in a round are still good.
    near = range(wanted, wanted // 2, -1)
    return next((rounds for rounds in near if rounds and tall % rounds == 0), 1)


def _bytes_moved(problem: MatmulProblem, met: int, mirrored: bool) -> float:
    h, w = problem.wafer.height, problem.wafer.width
    tall = -(-problem.rows // h) * h
    few = 2 * problem.rows <= tall  # padding is most of what a gather would move
    tile_x, tile_s = -(-problem.meeting // w), -(-problem.columns // w)

    def gather_bytes(columns: int, size: int) -> float:
        whole = problem.x_copies * columns * size
        return whole * problem.rows if few else whole * tall * (h - 1) / h

    def sum_bytes(columns: int) -> float:
        rows = 2 * problem.rows if few else tall
        return problem.x_copies * rows * columns * WORD_BYTES * (h - 1) / h

    flooded = met if problem.form != "nt" else 2 * met * (w - 1) / w
    moved = {
        "nn": gather_bytes(tile_x, problem.x_bytes) + flooded + sum_bytes(tile_s),
        "nt": gather_bytes(tile_s, problem.s_bytes) + flooded + sum_bytes(tile_x),
        "tn": gather_bytes(tile_x, problem.x_bytes)
        + flooded
        + gather_bytes(tile_s, problem.s_bytes),
    }[problem.form]
    return moved - flooded + problem.x if mirrored else moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stationary:
    """Y stays; the rows of X come to it, and the sums go where S lies."""

    rows: int  # of the whole matrices, without padding
    rounds: int = 1
    mirrored: bool = False
    ahead: bool = False  # the rows of the next round travel while these are multiplied

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: the sums over y are the last move."""

        def fetch(x: Num[Array, "... Mt Kx"], rows: int) -> Num[Array, "... {rows} _"]:
            return _gather_met_columns(x, rows, y.shape[-2], self.mirrored)

        def multiply(met: Num[Array, "... _ _"], result: TileResult) -> Float[Array, "... _ Nt"]:
            return tile.product("nn", met, y, result)

        return self._in_rounds(fetch, multiply, _sum_own_rows, x, result)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: the moves of `nn` backwards."""

        def multiply(rows: Num[Array, "... _ _"], result: TileResult) -> Float[Array, "... _ Ky"]:
            return tile.product("nt", rows, y, result)

        def finish(
            partial: Float[Array, "... _ Ky"], result: TileResult
        ) -> Float[Array, "... Mt Kx"]:
            if self.mirrored:
                return fabric.transpose(_sum_own_rows(partial, result, COLS))
            # A PE now has sums for the columns of X that meet its rows of Y. A tile of X has other
            # columns, which may lie on several PEs along y. So each of these PEs takes what it has
            # of the tile's columns, with zeros for the others; a sum along y joins them.
            met = fabric.all_reduce(partial, COLS)
            width = result.shape[-1]
            start = fabric.axis_index(COLS) * width - fabric.axis_index(ROWS) * met.shape[-1]
            return _sum_own_rows(panels.take_padded(met, -1, start, width), result)

        return self._in_rounds(_gather_rows, multiply, finish, s, result)

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: the rows of both come to it, and nothing is summed.

        In rounds it would be a sum over them. SUMMA is faster then, and holds no more.
        """
        if self.rounds > 1:
            return summa.Summa().tn(x, s, result)
        met = _gather_met_columns(x, self.rows, result.shape[-2], self.mirrored)
        return tile.product("tn", met, _gather_rows(s, self.rows), result)

    def _in_rounds(
        self,
        fetch: Callable[[Num[Array, "... _ _"], int], Num[Array, "... _ _"]],
        multiply: Callable[[Num[Array, "... _ _"], TileResult], Float[Array, "... _ _"]],
        finish: Callable[[Float[Array, "... _ _"], TileResult], Float[Array, "... _ _"]],
        a: Num[Array, "... _ _"],
        result: TileResult,
    ) -> Float[Array, "... _ _"]:
        """All rows at once, or a share of them in each round.

        Args:
          fetch: so many rows of the grid, from this PE's; moves tiles.
          multiply: these by this PE's tile of Y.
          finish: this PE's rows, from the products of all; moves sums.
          a: the tile with the rows.
          result: this PE's rows.
        """
        if self.rounds == 1:
            return finish(multiply(fetch(a, self.rows), result), result)
        *leading, height, width = result.shape
        share = result.with_shape(*leading, height // self.rounds, width)
        rows = fabric.axis_size(ROWS) * share.shape[-2]
        # A share is the same rows of every tile, so that each round is spread over all PEs.
        shares = jnp.moveaxis(jnp.reshape(a, (*a.shape[:-2], self.rounds, -1, a.shape[-1])), -3, 0)

        def add(carry: tuple | None, met: Num[Array, "... _ _"], i: steps.Number) -> tuple:
            if carry is None:
                return tile.zeros((self.rounds, *share.shape), a), multiply(met, share)
            # The sums of the round before travel while these rows are multiplied.
            results, sums = carry
            return results.at[i - 1].set(finish(sums, share)), multiply(met, share)

        def run(own: Num[Array, "... _ _"]) -> Float[Array, "... _ _"]:
            return finish(multiply(fetch(own, rows), share), share)

        if self.ahead:
            results, sums = steps.fold(
                fetch(shares[0], rows),
                lambda _, i: fetch(shares[i], rows),
                add,
                self.rounds,
                ahead=True,
                numbered=True,
            )
            results = results.at[-1].set(finish(sums, share))
        else:
            results = lax.map(run, shares)
        results = jnp.moveaxis(results, 0, -3)
        return jnp.reshape(results, (*results.shape[:-3], -1, results.shape[-1]))


def _gather_met_columns(
    x: Num[Array, "... Mt Kx"], rows: int, length: int, mirrored: bool
) -> Num[Array, "... {rows} {length}"]:
    """All rows of the columns of X that meet this PE's `length` rows of Y."""
    if mirrored:
        return _gather_rows(fabric.transpose(x), rows, COLS)
    x = _gather_rows(x, rows)
    start = fabric.axis_index(ROWS) * length - fabric.axis_index(COLS) * x.shape[-1]
    return fabric.flood(panels.take_padded(x, -1, start, length), COLS)


def _gather_rows(
    x: Num[Array, "... Mt _"], rows: int, along: str = ROWS
) -> Num[Array, "... {rows} _"]:
    """All rows along an axis, without those that are padding."""
    size, length = fabric.axis_size(along), x.shape[-2]
    if 2 * rows > size * length:
        return layout.resize(fabric.all_gather(x, along, -2), -2, rows)
    # Most rows are padding. A flood of the true ones, each in its place, sends fewer words.
    own_rows = panels.take_padded(x, -2, -fabric.axis_index(along) * length, rows)
    return fabric.flood(own_rows, along)


def _sum_own_rows(
    x: Float[Array, "... _ _"], result: TileResult, along: str = ROWS
) -> Float[Array, "... _ _"]:
    """The sum of `x` along an axis; this PE keeps its own rows."""
    size, length = fabric.axis_size(along), result.shape[-2]
    # A reduce-scatter sends padding too, an all-reduce every row twice.
    if 2 * x.shape[-2] > size * length:
        return fabric.reduce_scatter(layout.resize(x, -2, size * length), along, -2)
    whole = fabric.all_reduce(x, along)
    return panels.take_padded(whole, -2, fabric.axis_index(along) * length, length)
