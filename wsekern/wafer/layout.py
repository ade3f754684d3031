"""This file is how whole arrays of any size lie on a grid: their spec, padding and cropping.

An operand is `[..., rows, cols]`. Its rows lie along y, its columns along x, its first leading
dimension, if it has one, over the wafers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from wsekern.wafer import context, on_devices
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer, wafer_of_sharding


def as_array(operand: jax.typing.ArrayLike) -> jax.Array:
    """`operand` as an array of jax; one that is costs nothing, where `jnp.asarray` takes 20 us."""
    return operand if isinstance(operand, jax.Array) else jnp.asarray(operand)


def tiled(ndim: int, *trailing: str | None) -> P:
    """The spec of an operand: its last dimensions as `trailing` says, by default rows and columns.

    What leads them is unsplit, but for the first of it, which lies over the wafers.
    """
    trailing = trailing or (ROWS, COLS)
    leading = ndim - len(trailing)
    return P(*([WAFERS] + [None] * (leading - 1) if leading else []), *trailing)


def field_layout(
    field: Any, spec: P | None, wafer: Wafer | None
) -> tuple[Wafer | None, tuple[None | str | tuple[str, ...], ...]]:
    """The wafer of a field, None for none, and the axes that each dimension is split over.

    Args:
      field: if no wafer is given or entered, the mesh that it is split over becomes one.
      spec: the axes of each dimension; by default as the field is split, else the first dimension
        along y and over the wafers, the second along x.
      wafer: the wafer that was given.
    """
    sharding = on_devices.named_sharding(field)
    wafer = context.current() if wafer is None else wafer
    if wafer is None and sharding is not None and sharding.mesh.size > 1:
        wafer = wafer_of_sharding(sharding)
    entries: P | None = spec
    if spec is None and wafer is not None and sharding is not None and sharding.mesh == wafer.mesh:
        entries = on_devices.spec_in_wafer_axes(sharding.spec, wafer)
    wafer = context.resolve(wafer)
    if entries is None or not any(entries):
        entries = _field_spec(field.ndim, wafer) if spec is None else P()
    padded = (*entries, *[None] * (field.ndim - len(entries)))
    return wafer, tuple(_plain_entry(entry) for entry in padded)


def parts(spec: P, wafer: Wafer) -> int:
    """In how many parts `spec` divides an array, over all its dimensions."""
    return math.prod(_along(entry, wafer) for entry in spec)


def padded_shape(shape: tuple[int, ...], spec: P, wafer: Wafer) -> tuple[int, ...]:
    """`shape` with every dimension rounded up to a multiple of the PEs along it."""
    sizes = list(shape)
    for d, entry in enumerate(spec):
        sizes[d] = -(-sizes[d] // _along(entry, wafer)) * _along(entry, wafer)
    return tuple(sizes)


def pad(array: jax.Array, spec: P, wafer: Wafer, fill: float | None = 0.0) -> jax.Array:
    """`array` grown at its far ends with `fill`, until every dimension divides by its PEs.

    Where `fill` is None, with its last cells again. On Explicit axes it is laid out by `spec` too:
    a gradient must have its operand's very type.

    Raises:
      ValueError: the array lies on other devices.
    """
    on_devices.check_placed(wafer, array)
    wanted = padded_shape(array.shape, spec, wafer)
    if wanted != array.shape:
        widths = [(0, to - have) for have, to in zip(array.shape, wanted, strict=True)]
        if fill is None:
            array = jnp.pad(array, widths, mode="edge")
        else:
            array = jnp.pad(array, widths, constant_values=fill)
    if wafer.backend == "devices" and on_devices.explicit(wafer):
        array = on_devices.constrain(wafer, array, spec)
    return array


def crop(array: jax.Array, shape: tuple[int, ...], spec: P, wafer: Wafer) -> jax.Array:
    """The first `shape` of a padded `array`, which is laid out by `spec`."""
    if array.shape == tuple(shape):
        return array
    if wafer.backend == "devices" and on_devices.explicit(wafer):
        # An Explicit dimension cannot be cut to a size that does not divide: gather it first.
        kept = [
            None if a != b else s
            for a, b, s in zip(array.shape, shape, _full(spec, array), strict=True)
        ]
        array = on_devices.constrain(wafer, array, P(*kept))
    return array[tuple(slice(0, length) for length in shape)]


def resize(array: jax.Array, axis: int, length: int) -> jax.Array:
    """`array` with zeros added at the far end of `axis`, or cut there, to have `length` along it.

    For an array whose `axis` is whole where this runs: inside a kernel, on one device, or on Auto
    axes. An Explicit axis of a mesh cannot grow what it splits; lay the array out whole first.
    """
    size = array.shape[axis]
    if length < size:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis)
    if length == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - size)
    return jnp.pad(array, widths)


def _field_spec(ndim: int, wafer: Wafer | None) -> P:
    several = wafer is not None and wafer.wafers > 1
    if ndim == 1:
        return P((WAFERS, ROWS, COLS)) if several else P((ROWS, COLS))
    return P((WAFERS, ROWS), COLS) if several else P(ROWS, COLS)


def _plain_entry(entry: None | str | tuple[str, ...]) -> None | str | tuple[str, ...]:
    """The entry, a name alone instead of a tuple of one."""
    names = axes_of(entry)
    return None if not names else names[0] if len(names) == 1 else names


def _along(entry: None | str | tuple[str, ...], wafer: Wafer) -> int:
    return math.prod(wafer.axis_size(axis) for axis in axes_of(entry))


def _full(spec: P, array: jax.Array) -> list:
    return [*spec, *[None] * (array.ndim - len(spec))]
