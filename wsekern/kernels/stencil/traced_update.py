"""The user's update as a jaxpr: its Python code runs once.

The check of what it returns, the test whether it reads corners, the fusion on CPUs and every step
use that one jaxpr. A jaxpr holds for one shape only, but where a halo serves several steps, each of
them has a smaller window than the one before it: the cells that it computes for its neighbors grow
fewer. `narrow` makes their jaxprs from the first one. An update that it cannot follow, such as one
with a convolution, runs once for each size of window.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import PyTree

from wsekern.kernels.stencil import adjoint
from wsekern.kernels.stencil.buffers import Step, Tile, pad_tile
from wsekern.kernels.stencil.geometry import Width
from wsekern.kernels.stencil.narrow import narrow
from wsekern.kernels.stencil.plan import StencilPlan

Types = tuple[Any, ...]  # of windows and coefficients, as `jax.typeof` gives them
TileType = Tile | jax.ShapeDtypeStruct  # an array, or what stands for one
StepType = Step | jax.ShapeDtypeStruct


class RadiusError(ValueError):
    """An update does not take off the cells that its radius says; it takes off `off`."""

    def __init__(self, message: str, off: Sequence[int]) -> None:
        super().__init__(message)
        self.off = tuple(off)

    def radius_of_update(self, radius: Width | Sequence[Width]) -> tuple[int, ...]:
        """The radius of each dimension, if `update` is right by it; else raises this error.

        One number is meant for the dimensions that `update` takes cells off. Before it is traced,
        how the fields are split is only a guess at them.

        Args:
          radius: as the user gave it.
        """
        if not isinstance(radius, int) or not any(self.off) or set(self.off) - {0, 2 * radius}:
            raise self
        return tuple(radius if cells else 0 for cells in self.off)


class TracedUpdate:
    """The update of a plan, traced when it meets operands of new types.

    Equal to itself alone, so that it can be static data of a pytree.
    """

    def __init__(self, plan: StencilPlan) -> None:
        self.plan = plan
        self._jaxprs: dict[Types, core.ClosedJaxpr] = {}
        self._traced: list[Types] = []  # the types that the Python code ran for

    def __call__(
        self, windows: Sequence[Tile], coefficients: Sequence[Tile], step: Step
    ) -> list[Tile]:
        """The new cells of each field, by the kept jaxpr."""
        # Outside a loop the step is a Python integer, which would be another type to trace for.
        step = jnp.asarray(step, jnp.int32)
        operands = [*windows, *coefficients, *([step] if self.plan.takes_step else [])]
        return core.jaxpr_as_fun(self.jaxpr(windows, coefficients, step))(*operands)

    def jaxpr(
        self, windows: Sequence[TileType], coefficients: Sequence[TileType], step: StepType
    ) -> core.ClosedJaxpr:
        """The update for operands of these types: arrays, or what stands for them.

        Raises:
          ValueError: the update changes the structure or a dtype of the fields, or does not take
            `radius` cells off.
        """
        # Types say shape, dtype, and on devices over which axes a tile varies. A jaxpr that was
        # traced for one of them is not valid for another: JAX casts operands while it traces.
        types = tuple(jax.typeof(operand) for operand in (*windows, *coefficients))
        if types not in self._jaxprs:
            closed = self._narrow(types, step)
            if closed is None:
                closed = self._trace(windows, coefficients, step)
                self._traced.append(types)
            self._jaxprs[types] = closed
        return self._jaxprs[types]

    def _narrow(self, types: Types, step: StepType) -> core.ClosedJaxpr | None:
        """The jaxpr made of one for larger operands, if there is one that `narrow` can follow."""
        windows = types[: len(self.plan.lines)]
        shapes = [
            tuple(n - sum(pair) for n, pair in zip(window.shape, self.plan.radius, strict=True))
            for window in windows
        ]
        operands = [*types, *([jax.typeof(step)] if self.plan.takes_step else [])]
        larger = (traced for traced in self._traced if _differ_in_size_only(types, traced))
        narrowed = (narrow(self._jaxprs[traced], operands, shapes) for traced in larger)
        return next((closed for closed in narrowed if closed is not None), None)

    def _trace(
        self, windows: Sequence[TileType], coefficients: Sequence[TileType], step: StepType
    ) -> core.ClosedJaxpr:
        plan = self.plan
        arguments = [jax.tree.unflatten(plan.tree, windows)]
        if plan.coefficient_tree.num_leaves:
            arguments.append(jax.tree.unflatten(plan.coefficient_tree, coefficients))
        named = {"step": step} if plan.takes_step else {}
        # Directly, without a wrapper: the user's traceback then shows our call just once.
        trace = jax.make_jaxpr(plan.update, return_shape=True)
        closed, new = trace(*arguments, **named)
        self._check(windows, new)
        return closed

    def reads_corners(self, closed: core.ClosedJaxpr) -> bool:
        """Whether the update reads cells diagonally across, as far as its slices say."""
        fields = closed.in_avals[: len(self.plan.lines)]
        if not all(jnp.issubdtype(field.dtype, jnp.floating) for field in fields):
            return True  # slices of integers are not followed
        for windows in adjoint.windows_read(closed)[: len(fields)]:
            for low, high in windows:
                beyond = [
                    begin < before or end > size - after
                    for begin, end, size, (before, after) in zip(
                        low, high, fields[0].shape, self.plan.radius, strict=True
                    )
                ]
                if sum(beyond) > 1:  # beyond the tile in two dimensions at once
                    return True
        return False

    def _check(self, windows: Sequence[TileType], new: PyTree[jax.ShapeDtypeStruct]) -> None:
        operation, tree, radius = self.plan.operation, self.plan.tree, self.plan.radius
        if jax.tree.structure(new) != tree:
            raise ValueError(
                f"{operation}: update makes {jax.tree.structure(new)} of fields {tree}; it must "
                "give the fields that it takes"
            )
        # At each size that it is traced for: it may be right for one, and wrong for another.
        for window, result in zip(windows, jax.tree.leaves(new), strict=True):
            inside = tuple(n - sum(pair) for n, pair in zip(window.shape, radius, strict=True))
            if result.shape != inside:
                off = [a - b for a, b in zip(window.shape, result.shape, strict=False)]
                raise RadiusError(
                    f"{operation}: radius is {radius}, so update must make {inside} of "
                    f"{tuple(window.shape)}, and it makes {result.shape}: it takes {off} cells off",
                    off if result.ndim == window.ndim else (),
                )
            if result.dtype != window.dtype:
                raise ValueError(
                    f"{operation}: update makes {result.dtype} of {window.dtype}; cast what it "
                    "returns, or its constants"
                )


def _differ_in_size_only(smaller: Types, larger: Types) -> bool:
    """Whether operands of the types `smaller`, with more cells, are of the types `larger`."""
    growths = [
        [big - small for small, big in zip(a.shape, b.shape, strict=True)]
        for a, b in zip(smaller, larger, strict=True)
    ]
    if min((n for growth in growths for n in growth), default=0) < 0:
        return False

    def grow(*tiles: Tile) -> list[Tile]:
        return [pad_tile(t, tuple((0, n) for n in g)) for t, g in zip(tiles, growths, strict=True)]

    grown = jax.make_jaxpr(grow)(*smaller).out_avals
    return all(a == b for a, b in zip(grown, larger, strict=True))
