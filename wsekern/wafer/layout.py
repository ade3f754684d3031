"""How whole arrays of any size lie on a grid of PEs: their spec, padding, cropping and resizing.

`wk.layout` is this module. It is for operations of your own, around `Wafer.map`:

- `tiled`: the spec of an operand, by default rows along y and columns along x;
- `padded_shape`, `pad`: round every dimension up to a multiple of the PEs along it;
- `crop`: the inverse of `pad`;
- `resize`: pad or cut one dimension, inside a kernel too;
- `reshape`, `repeat`: split, join or repeat dimensions that lie along an axis of the grid;
- `tilewise`: a function of one's own, applied by every PE to its own tiles;
- `parts`: into how many parts a spec divides an array;
- `as_array`: `jnp.asarray`, at no cost for what is an array already.

An operand is `[..., rows, cols]`. Its rows lie along y, its columns along x. Its first leading
dimension, if it has one, lies over the wafers; the other leading dimensions are not split.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import context, on_devices
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.specs import broadcast_specs
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
      fill: the value of the padding; None repeats the last cells of each dimension, as constants:
        the padding has no derivative.
      multiples: numbers that the last dimensions must divide by too, one for each.

    Raises:
      ValueError: the array lies on other devices.
    """
    on_devices.check_placed(wafer, array)
    wanted = padded_shape(array.shape, spec, wafer, multiples)
    if wanted != array.shape:
        widths = [(0, to - have) for have, to in zip(array.shape, wanted, strict=True)]
        if fill is None:
            array = _repeat_last(array, tuple(widths))
        else:
            array = jnp.pad(array, widths, constant_values=fill)
    if wafer.backend == "devices" and on_devices.explicit(wafer):
        # An Explicit sharding is part of the array's type, which its gradient must have too.
        array = on_devices.constrain(wafer, array, spec)
    return array


# What is computed of padding is cut off, so its cotangent is 0, or 0 times an infinite slope: NaN.
# Neither may be added to that of the cells that were repeated.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _repeat_last(
    array: Shaped[Array, "..."], widths: tuple[tuple[int, int], ...]
) -> Shaped[Array, "..."]:
    return jnp.pad(array, widths, mode="edge")


@_repeat_last.defjvp
def _repeat_last_jvp(
    widths: tuple[tuple[int, int], ...],
    primals: tuple[Shaped[Array, "..."]],
    tangents: tuple[Shaped[Array, "..."]],
) -> tuple[Shaped[Array, "..."], Any]:  # of integers a NumPy array, which jax.Array is not
    padded = _repeat_last(primals[0], widths)
    if tangents[0].dtype == jax.dtypes.float0:  # of integers, such as a mask
        return padded, np.zeros(padded.shape, jax.dtypes.float0)
    return padded, jnp.pad(tangents[0], widths)


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


def reshape(
    array: Shaped[Array, "..."],
    shape: tuple[int, ...],
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Shaped[Array, "..."]:
    """`array.reshape(shape)`, tile by tile.

    A dimension that the reshape leaves as it is stays split. If one becomes several, or several
    become one, the first of them carries the axes; it must divide by the PEs along it before and
    after. Then nothing moves. Else every PE first gathers the dimension, and the result is whole
    along it.

        [B, T, 4 * 32] laid out P("wafer", "y", "x") to [B, T, 4, 32]
        2 columns: stays, P("wafer", "y", "x", None)
        3 columns: 4 does not divide, so the features are gathered along x; P("wafer", "y")

    Use it for every reshape of a whole array that splits or joins a dimension that lies along an
    axis of the grid. XLA's partitioner, which jax's own reshape asks, gathers the array along all
    axes where sizes do not divide, and on some grids (2x3 for the example with T = 1) it recurses
    until the process dies.

    Args:
      array: a whole array.
      shape: the new shape; one size may be -1.
      spec: how `array` lies on the wafer; by default `tiled(array.ndim)`.
      wafer: the wafer; by default the current one.

    Raises:
      ValueError: `spec` has more dimensions than `array`.
      TypeError: `shape` has another number of elements.
    """
    wafer = context.resolve(wafer)
    if wafer is None or wafer.mesh is None:
        return array.reshape(shape)
    shape = jax.eval_shape(functools.partial(jnp.reshape, shape=shape), _whole(array)).shape
    if not array.size:
        return jnp.zeros(shape, array.dtype)
    before, after, gathers = _reshaped_specs(array.shape, shape, _entries(spec, array.ndim), wafer)
    if gathers and wafer.backend == "abstract":
        return array.reshape(shape)  # nothing partitions it; an estimate prices a relayout
    padded = pad(array, before, wafer)
    whole = padded_shape(shape, after, wafer)
    tile = tuple(n // _pes_along(entry, wafer) for n, entry in zip(whole, after, strict=True))
    kernel = functools.partial(jnp.reshape, shape=tile)
    return crop(wafer.map(kernel, in_specs=before, out_specs=after)(padded), shape, after, wafer)


def repeat(
    array: Shaped[Array, "..."], repeats: int, axis: int, spec: P, wafer: Wafer
) -> Shaped[Array, "..."]:
    """`jnp.repeat(array, repeats, axis)`; with `axis` gathered first and whole after.

    Like `reshape`, it asks nothing of XLA's partitioner.

    Args:
      array: a whole array.
      repeats: how often each entry stands in the result.
      axis: the dimension, from 0.
      spec: how `array` lies on the wafer.
      wafer: the wafer.
    """
    run = functools.partial(jnp.repeat, repeats=repeats, axis=axis)
    if wafer.backend == "abstract":
        return run(array)  # nothing partitions it; an estimate prices a relayout
    whole = P(*(None if d == axis else entry for d, entry in enumerate(spec)))
    return tilewise(run, array, in_specs=(whole,), out_specs=whole, wafer=wafer)


def tilewise(
    function: Callable[..., Any],
    *operands: Shaped[Array, "..."],
    in_specs: tuple[P, ...],
    out_specs: Any,
    wafer: Wafer | None = None,
) -> Any:
    """`function(*operands)`, where every PE applies `function` to its own tiles.

    It is `Wafer.map` for sizes that do not divide: operands are padded and results cropped. A
    look-up in a dimension that is whole on every PE belongs here. Its gradient is a scatter, and
    where XLA's partitioner splits a scatter along a dimension that does not divide, it adds the
    padding too: the result is wrong.

    Args:
      function: of arrays of any size; it computes each tile of its results from the same tile of
        its operands alone, and it is the same program for equal functions, as for `Wafer.map`.
      operands: whole arrays.
      in_specs: how each lies on the wafer.
      out_specs: how the results lie, a pytree of their structure or a prefix of it.
      wafer: the wafer; by default the current one.
    """
    wafer = context.resolve(wafer)
    if wafer is None or wafer.mesh is None:
        return function(*operands)
    shapes, tree = jax.tree.flatten(jax.eval_shape(function, *map(_whole, operands)))
    padded = [pad(x, spec, wafer) for x, spec in zip(operands, in_specs, strict=True)]
    results = jax.tree.leaves(wafer.map(function, in_specs=in_specs, out_specs=out_specs)(*padded))
    specs = broadcast_specs(out_specs, jax.tree.unflatten(tree, shapes), "out_specs")
    cropped = [
        crop(result, shape.shape, spec, wafer)
        for result, shape, spec in zip(results, shapes, specs, strict=True)
    ]
    return jax.tree.unflatten(tree, cropped)


def _whole(array: Shaped[Array, "..."]) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, without the Explicit sharding that its type may have."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _entries(spec: P | None, ndim: int) -> list[Any]:
    """An entry of `spec` for each dimension."""
    spec = tiled(ndim) if spec is None else spec
    if len(spec) > ndim:
        raise ValueError(
            f"layout.reshape: spec {spec} has {len(spec)} dimensions, the array {ndim}"
        )
    return [*spec, *[None] * (ndim - len(spec))]


def _reshaped_specs(
    old: tuple[int, ...], new: tuple[int, ...], entries: list[Any], wafer: Wafer
) -> tuple[P, P, bool]:
    """The layouts before and after a reshape by tiles, and whether a dimension is gathered for it.

    Args:
      old: the shape before.
      new: the shape after.
      entries: how the array lies, for each dimension of `old`.
      wafer: the wafer.
    """
    before: list[Any] = [None] * len(old)
    after: list[Any] = [None] * len(new)
    gathers = False
    for sources, results in _groups(old, new):
        split = [d for d in sources if _pes_along(entries[d], wafer) > 1]
        if not split:
            continue
        # The first dimension of a group carries the axes.
        source, result, pes = sources[0], results[0], _pes_along(entries[sources[0]], wafer)
        unchanged = len(sources) == len(results) == 1  # it may be padded
        if split == [source] and (unchanged or old[source] % pes == new[result] % pes == 0):
            before[source] = after[result] = entries[source]
        else:
            gathers = True
    return P(*before), P(*after), gathers


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of two shapes that hold the same elements; those of size 1 are left out.

    [2, 1, 12, 5] and [2, 3, 4, 5] have the groups (0 | 0), (2 | 1, 2) and (3 | 3).
    """
    groups = []
    sources, results = ([d for d, n in enumerate(shape) if n > 1] for shape in (old, new))
    while sources:
        i = j = 1
        while (here := math.prod(old[d] for d in sources[:i])) != (
            there := math.prod(new[d] for d in results[:j])
        ):
            i, j = (i + 1, j) if here < there else (i, j + 1)
        groups.append((sources[:i], results[:j]))
        sources, results = sources[i:], results[j:]
    return groups


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
