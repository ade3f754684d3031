"""Choose a field's wafer, and the axes it is split over, from the arguments or its sharding.

Stencils need no `with wafer`: an array that is split over a mesh says enough.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import context
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer

Entry = None | str | tuple[str, ...]  # the axes over which one dimension is split


def field_layout(
    field: Shaped[Array | np.ndarray, "..."], spec: P | None, wafer: Wafer | None
) -> tuple[Wafer | None, tuple[Entry, ...]]:
    """The field's wafer, or None, and the axes that each dimension is split over.

    Args:
      field: if no wafer is given or entered, the mesh that it is split over becomes one.
      spec: the axes of each dimension; by default as the field is split, else the first dimension
        along y and over the wafers, the second along x.
      wafer: the wafer that was given.
    """
    sharding = _named_sharding(field)
    wafer = context.current() if wafer is None else wafer
    if wafer is None and sharding is not None and sharding.mesh.size > 1:
        wafer = _wafer_of(sharding)
    entries: P | None = spec
    if spec is None and wafer is not None and sharding is not None and sharding.mesh == wafer.mesh:
        entries = _in_wafer_axes(sharding.spec, wafer)
    wafer = context.resolve(wafer)
    if entries is None or not any(entries):
        entries = _default_spec(field.ndim, wafer) if spec is None else P()
    padded = (*entries, *[None] * (field.ndim - len(entries)))
    return wafer, tuple(_plain_entry(entry) for entry in padded)


def _named_sharding(array: Any) -> NamedSharding | None:
    """How an array, or a tracer of one, is split over a mesh; None if it is not."""
    if isinstance(array, jax.core.Tracer):
        sharding = getattr(jax.typeof(array), "sharding", None)
    else:
        sharding = getattr(array, "sharding", None)
    split = isinstance(sharding, NamedSharding) and any(sharding.spec)
    return sharding if split else None


def _wafer_of(sharding: NamedSharding) -> Wafer | None:
    """The mesh of an array as a wafer; None if the array is split over no axis or over too many.

    The mesh axes that split the array become, from the last to the first, x, y and wafer: one that
    is split as P("data", "model") has y = "data" and x = "model".
    """
    used = [name for entry in sharding.spec for name in axes_of(entry)]
    used = [name for name in used if sharding.mesh.shape[name] > 1]
    if not used or len(used) > len(AXES) or set(used) & set(SPREAD.values()):
        return None
    axes = AXES[len(AXES) - len(used) :]
    sizes = {axis: sharding.mesh.shape[name] for axis, name in zip(axes, used, strict=True)}
    return Wafer(
        backend="devices",
        height=sizes.get(ROWS, 1),
        width=sizes[COLS],
        wafers=sizes.get(WAFERS, 1),
        mesh=sharding.mesh,
        names=tuple(zip(axes, used, strict=True)),
    )


def _in_wafer_axes(spec: P, wafer: Wafer) -> P:
    """Rename a spec's mesh axes to the wafer's; drop the others."""
    axis_of = {name: axis for axis in wafer.axes for name in wafer.mesh_spec(P(axis))}
    return P(*(tuple(axis_of[n] for n in axes_of(e) if n in axis_of) or None for e in spec))


def _default_spec(ndim: int, wafer: Wafer | None) -> P:
    several = wafer is not None and wafer.wafers > 1
    if ndim == 1:
        return P((WAFERS, ROWS, COLS)) if several else P((ROWS, COLS))
    return P((WAFERS, ROWS), COLS) if several else P(ROWS, COLS)


def _plain_entry(entry: Entry) -> Entry:
    """The entry, a name alone instead of a tuple of one."""
    names = axes_of(entry)
    return None if not names else names[0] if len(names) == 1 else names
