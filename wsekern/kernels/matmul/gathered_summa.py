"""SUMMA on TPUs and GPUs, where a panel has a share of every tile; the next one is on its way.

The panels of `summa` are broadcast by one PE of each line. On a wafer that is a flood; here it
would be a sum to which all others add zeros, and which nothing hides. So a panel is made of the
same share of every tile. Each PE sends its own, no word is sent that nobody needs, and all links
are busy. The meeting dimension of the panel is not in one piece, but it is the same in both
factors.

On a square of TPUs, whose moves go on side by side, each share comes straight from its owner: PE
(y, x) multiplies those of its row and column in the order y + x, y + x + 1, ..., so that nothing is
put together first. Elsewhere a panel is gathered. In `a @ b^T` and `a^T @ b` on a square one factor
is reflected in the diagonal; on a rectangle sums are scattered.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import lax
from jaxtyping import Array, Float, Num

from wsekern import fabric
from wsekern.kernels.matmul import shares, steps, tile
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS

Panels = tuple[Num[Array, "... _ _"], Num[Array, "... _ _"]]  # of the left and the right factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredSumma:
    """`panels` products, or as many for each PE of a line; two panels of each factor are held."""

    panels: int
    pieces: bool  # shares come straight from their owners

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y."""
        return self._multiply("nn", x, y, result)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T."""
        if _is_square():
            return self._multiply("nt", s, fabric.transpose(y), result)
        return self._scatter_sums("nt", s, y, result)

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S."""
        if _is_square():
            return self._multiply("tn", fabric.transpose(x), s, result)
        return self._scatter_sums("tn", x, s, result)

    def _multiply(
        self,
        form: tile.Form,
        a: Num[Array, "... _ _"],
        b: Num[Array, "... _ _"],
        result: TileResult,
    ) -> Float[Array, "... _ _"]:
        """The product of factors that lie as those of `a @ b`."""
        axes = tile.SUMMED[form]
        if _is_square():  # else the whole matrices are padded, as tiles of both have other lengths
            length = -(-a.shape[axes[0]] // self.panels) * self.panels
            a, b = layout.resize(a, axes[0], length), layout.resize(b, axes[1], length)

        def panel(i: steps.Number) -> list[Panels]:
            left, right = (
                shares.take(x, axis, along, i, self.panels)
                for x, axis, along in zip((a, b), axes, (COLS, ROWS), strict=True)
            )
            if not self.pieces:
                gathered = fabric.all_gather(left, COLS, axes[0])
                return [(gathered, fabric.all_gather(right, ROWS, axes[1]))]
            return [
                (
                    fabric.skew(left, COLS, ROWS, times=-1, plus=-k),
                    fabric.skew(right, ROWS, COLS, times=-1, plus=-k),
                )
                for k in range(fabric.axis_size(ROWS))
            ]

        def add(total: Float[Array, "... _ _"] | None, panel: list[Panels], _: steps.Number) -> Any:
            for pair in panel:
                product = tile.product(form, *pair, result)
                # With the barrier and the product on the left each product's own loop adds.
                total = product if total is None else lax.optimization_barrier(product + total)
            return total

        return self._fold(panel, add)

    def _fold(
        self,
        panel: Callable[[Any], Any],
        add: Callable[[Any, Any, steps.Number], Any],
    ) -> Any:
        """The total after `add` has used every panel."""
        return steps.fold(
            panel(0),
            lambda _, i: panel(i),
            add,
            self.panels,
            ahead=True,
            numbered=True,
            in_turn=not self.pieces,  # there are many small ones, and none waits for another
        )

    def _scatter_sums(
        self,
        form: tile.Form,
        a: Num[Array, "... _ _"],
        b: Num[Array, "... _ _"],
        result: TileResult,
    ) -> Float[Array, "... _ _"]:
        """The product of two factors of which one's panels are gathered and the result's summed."""
        factor, along, along_sums = (b, ROWS, COLS) if form == "nt" else (a, COLS, ROWS)
        axis, axis_sums = (-2, -1) if form == "nt" else (-1, -2)

        def panel(i: steps.Number) -> Num[Array, "... _ _"]:
            share = shares.take(factor, axis, along, i, self.panels)
            return fabric.all_gather(share, along, axis)

        def multiply(panel: Num[Array, "... _ _"]) -> Float[Array, "... _ _"]:
            pair = (a, panel) if form == "nt" else (panel, b)
            return tile.product(form, *pair, result)

        def scatter(
            x: Float[Array, "... _ _"], sums: Float[Array, "... _ _"], i: steps.Number
        ) -> Any:
            own = fabric.reduce_scatter(sums, along_sums, axis_sums)
            return shares.put(x, own, axis_sums, along_sums, i, self.panels)

        def add(carry: tuple | None, panel: Num[Array, "... _ _"], i: steps.Number) -> tuple:
            if carry is None:
                return tile.zeros(result.shape, a, b), multiply(panel)
            # The sums of the panel before travel while this one is multiplied.
            x, sums = carry
            return scatter(x, sums, i - 1), multiply(panel)

        x, sums = self._fold(panel, add)
        return scatter(x, sums, self.panels - 1)


def _is_square() -> bool:
    return fabric.axis_size(ROWS) == fabric.axis_size(COLS)
