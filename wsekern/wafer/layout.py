"""How whole arrays of any size lie on a grid of PEs: their spec, padding, cropping and resizing.

`wk.layout` is this module. It is for operations of your own, around `Wafer.map`:

- `tiled`: the spec of an operand, by default rows along y and columns along x;
- `padded_shape`, `pad`: round every dimension up to a multiple of the PEs along it;
- `crop`: the inverse of `pad`;
- `resize`: pad or cut one dimension, inside a kernel too;
- `parts`: into how many parts a spec divides an array;
- `as_array`: `jnp.asarray`, at no cost for what is an array already.

An operand is `[..., rows, cols]`. Its rows lie along y, its columns along x. Its first leading
dimension, if it has one, lies over the wafers; the other leading dimensions are not split.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import on_devices
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer


def as_array(operand: jax.typing.ArrayLike) -> Shaped[Array, "..."]:
    """`operand` as a JAX array. An array is returned at once, where `jnp.asarray` takes 20 us."""
    return operand if isinstance(operand, jax.Array) else jnp.asarray(operand)


def tiled(ndim: int, *trailing: str | None) -> P:
    """The spec of an operand with `ndim` dimensions: `P("wafer", None, ..., "y", "x")`.

    Args:
      ndim: dimensions of the operand. The first leading one, if there is one, lies over the
        wafers; the other leading ones are not split.
      trailing: the axes of the last dimensions; by default `"y", "x"`.
    """
    trailing = trailing or (ROWS, COLS)
    leading = ndim - len(trailing)
    return P(*([WAFERS] + [None] * (leading - 1) if leading else []), *trailing)


def parts(spec: P, wafer: Wafer) -> int:
    """Into how many parts `spec` divides an array on `wafer`, over all dimensions."""
    return math.prod(_pes_along(entry, wafer) for entry in spec)


def padded_shape(
    shape: tuple[int, ...], spec: P, wafer: Wafer, multiples: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """`shape` with every dimension rounded up to a multiple of the PEs along it.

    Args:
      shape: of a whole array.
      spec: how it lies on the wafer.
      wafer: the wafer.
      multiples: numbers that the last dimensions must divide by too, one for each.
    """
    pes = [_pes_along(entry, wafer) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    multiples = (1,) * (len(shape) - len(multiples)) + multiples
    units = [math.lcm(*pair) for pair in zip(pes, multiples, strict=True)]
    return tuple(-(-length // unit) * unit for length, unit in zip(shape, units, strict=True))


def pad(
    array: Shaped[Array, "..."],
    spec: P,
    wafer: Wafer,
    fill: float | None = 0.0,
    multiples: tuple[int, ...] = (),
) -> Shaped[Array, "..."]:
    """`array` padded at its far ends until every dimension divides by the PEs along it.

    Args:
      array: a whole array.
      spec: how it lies on the wafer.
      wafer: the wafer.
      fill: the value of the padding; None repeats the last cells of each dimension.
      multiples: numbers that the last dimensions must divide by too, one for each.

    Raises:
      ValueError: the array lies on other devices.
    """
    on_devices.check_placed(wafer, array)
    wanted = padded_shape(array.shape, spec, wafer, multiples)
    if wanted != array.shape:
        widths = [(0, to - have) for have, to in zip(array.shape, wanted, strict=True)]
        if fill is None:
            array = jnp.pad(array, widths, mode="edge")
        else:
            array = jnp.pad(array, widths, constant_values=fill)
    if wafer.backend == "devices" and on_devices.explicit(wafer):
        # An Explicit sharding is part of the array's type, which its gradient must have too.
        array = on_devices.constrain(wafer, array, spec)
    return array


def crop(
    array: Shaped[Array, "..."], shape: tuple[int, ...], spec: P, wafer: Wafer
) -> Shaped[Array, "..."]:
    """`array` without its padding.

    Args:
      array: a padded array.
      shape: its shape before padding.
      spec: how the padded array lies on the wafer.
      wafer: the wafer.
    """
    if array.shape == tuple(shape):
        return array
    if wafer.backend == "devices" and on_devices.explicit(wafer):
        # An Explicit dimension cannot be cut to a size that does not divide: gather it first.
        entries = [*spec, *[None] * (array.ndim - len(spec))]
        kept = [
            entry if before == after else None
            for before, after, entry in zip(array.shape, shape, entries, strict=True)
        ]
        array = on_devices.constrain(wafer, array, P(*kept))
    return array[tuple(slice(0, length) for length in shape)]


def resize(array: Shaped[Array, "..."], axis: int, length: int) -> Shaped[Array, "..."]:
    """`array` with zeros added at the far end of `axis`, or cut there, to have `length` along it.

    For an array whose `axis` is whole where this runs: inside a kernel, on one device, or on Auto
    axes. An Explicit axis of a mesh cannot grow what it splits; lay the array out whole first.

    Args:
      array: of any shape but a scalar's.
      axis: the dimension to resize; counted from the end if negative.
      length: the size it gets.

    Raises:
      ValueError: `array` has no such axis, or `length` is not an integer of 0 or more.
    """
    _check_resize(array, axis, length)
    size = array.shape[axis]
    if length < size:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis)
    if length == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - size)
    return jnp.pad(array, widths)


def _check_resize(array: Shaped[Array, "..."], axis: int, length: int) -> None:
    if not isinstance(axis, int | np.integer) or not -array.ndim <= axis < array.ndim:
        raise ValueError(
            f"layout.resize: axis={axis!r} is no dimension of an array of shape {array.shape}; "
            f"give an integer from {-array.ndim} to {array.ndim - 1}"
        )
    if not isinstance(length, int | np.integer) or length < 0:
        raise ValueError(f"layout.resize: length={length!r} must be an integer of 0 or more")


def _pes_along(entry: Any, wafer: Wafer) -> int:
    return math.prod(wafer.axis_size(axis) for axis in axes_of(entry))
