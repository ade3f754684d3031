"""The specs of a kernel's operands and results, and the checks that arrays fit them."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer.axes import AXES, axes_of

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True)
class Specs:
    """The specs of all operands and results: pytrees of any kind, made hashable."""

    operands: tuple
    results: tuple

    @classmethod
    def of(cls, in_specs: Any, out_specs: Any) -> "Specs":
        operands, results = (_flatten_specs(s) for s in (in_specs, out_specs))
        return cls(operands, results)

    @property
    def in_specs(self) -> Any:
        return jax.tree.unflatten(self.operands[1], self.operands[0])

    @property
    def out_specs(self) -> Any:
        return jax.tree.unflatten(self.results[1], self.results[0])


def broadcast_specs(specs: Any, tree: Any, name: str) -> list[P]:
    """One spec for each leaf of `tree`, from a pytree prefix of specs; `name` is for errors."""
    try:
        full = jax.tree.map(lambda s, sub: jax.tree.map(lambda _: s, sub), specs, tree)
    except ValueError as error:
        raise ValueError(
            f"Wafer.map: {name}={specs} does not match the structure of what it describes, "
            f"{jax.tree.structure(tree)}"
        ) from error
    return jax.tree.leaves(full)


def named_axes(spec: P) -> set[str]:
    """The axes that `spec` names, over all dimensions."""
    return {axis for entry in spec for axis in axes_of(entry)}


def check_divides(wafer: "Wafer", operation: str, array: Any, spec: P) -> None:
    """Raises ValueError if a dimension of `array` does not divide by the PEs along it."""
    shape = jnp.shape(array)
    if len(spec) > len(shape):
        raise ValueError(
            f"{operation}: an operand of shape {shape} has {len(shape)} dimensions, its spec "
            f"{spec} has {len(spec)}"
        )
    check_axes(operation, spec)
    for d, entry in enumerate(spec):
        parts = math.prod(wafer.axis_size(axis) for axis in axes_of(entry))
        if shape[d] % parts:
            raise ValueError(
                f"{operation}: dimension {d} of an operand of shape {shape} does not divide by the "
                f"{parts} PEs along {entry!r}; pad it to {-(-shape[d] // parts) * parts}"
            )


def check_inside(wafer: "Wafer", operation: str, at: dict[str, int]) -> None:
    """Raises ValueError if there is no PE at `at`, axis -> place."""
    for axis, index in at.items():
        if not 0 <= index < wafer.axis_size(axis):
            raise ValueError(
                f"{operation}: {axis}={index} is outside the grid, which has "
                f"{wafer.axis_size(axis)} along {axis}"
            )


def tile_at(
    wafer: "Wafer", array: Shaped[Array, "..."], at: dict[str, int], spec: P
) -> Shaped[Array, "..."]:
    """The tile of an array laid out by `spec` that the PE at `at`, axis -> place, holds."""
    slices = []
    for entry, length in zip(spec, array.shape, strict=False):
        index, parts = 0, 1  # the place along all axes of this dimension, row-major
        for axis in axes_of(entry):
            index = index * wafer.axis_size(axis) + at[axis]
            parts *= wafer.axis_size(axis)
        slices.append(slice(index * length // parts, (index + 1) * length // parts))
    return array[tuple(slices)]


def check_axes(operation: str, spec: P) -> None:
    """Raises ValueError if `spec` names an unknown axis, or one axis twice."""
    named = [axis for entry in spec for axis in axes_of(entry)]
    for axis in named:
        if axis not in AXES:
            raise ValueError(f"{operation}: {axis!r} in {spec} is not one of {AXES}")
        if named.count(axis) > 1:
            raise ValueError(
                f"{operation}: {axis!r} stands twice in {spec}; it splits one dimension"
            )


def _flatten_specs(specs: Any) -> tuple:
    leaves, tree = jax.tree.flatten(specs)
    for leaf in leaves:
        if not isinstance(leaf, P):
            raise ValueError(
                f"Wafer.map: {leaf!r} stands where a jax.sharding.PartitionSpec belongs; "
                "P() is whole on every PE"
            )
        check_axes("Wafer.map", leaf)
    return tuple(leaves), tree
