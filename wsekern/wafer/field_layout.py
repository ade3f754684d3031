"""Choose a field's wafer, and the axes it is split over, from the arguments or its sharding.

Stencils need no `with wafer`: an array that is split over a mesh says enough. Inside jit, grad and
vmap it says so only on Explicit axes, which are part of its type. On Auto axes the type says over
which mesh an array may be split, but XLA decides how, after the program is traced.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import context, cpu_threads
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer

Entry = None | str | tuple[str, ...]  # the axes over which one dimension is split


class FieldLayout(NamedTuple):
    """Where fields lie, and how."""

    wafer: Wafer | None
    along: tuple[Entry, ...]  # the axes that each dimension is split over
    # Whether the layout is this module's own choice, as the fields' own is not known; any other
    # gives the same values.
    chosen: bool = False


def field_layout(
    operation: str,
    fields: Sequence[Shaped[Array | np.ndarray, "..."]],
    spec: P | None,
    wafer: Wafer | None,
    *,
    shape_depends: bool,
) -> FieldLayout:
    """The wafer of some fields, or None, and the axes that each of their dimensions is split over.

    Args:
      operation: the public function, for messages.
      fields: of one shape. If no wafer is given or entered, the mesh that the first of them that is
        split is split over becomes one.
      spec: the axes of each dimension; by default as the fields are split, else the first dimension
        along y and over the wafers, the second along x.
      wafer: the wafer that was given.
      shape_depends: whether the shape of the operation's result depends on how the fields are
        split. If not, fields whose split is not known are laid out over all of their mesh.

    Raises:
      ValueError: the result's shape depends on a split that is not known, or that is over Auto and
        Explicit axes at once.
    """
    wafer = context.current() if wafer is None else wafer
    sharding = next((s for s in map(_known_split, fields) if s is not None), None)
    chosen = False
    if wafer is None:
        unknown = next((m for m in map(_mesh_of_unknown_split, fields) if m is not None), None)
        if unknown is not None and shape_depends:
            raise _unknown_split(operation, unknown)
        if sharding is not None and sharding.mesh.size > 1:
            used = _axes_that_split(sharding)
            wafer = _wafer_of(
                sharding.mesh, _one_kind(operation, sharding.mesh, used, shape_depends)
            )
        elif unknown is not None:
            wafer = _wafer_of(unknown, _auto_axes(unknown))
            chosen = spec is None and wafer is not None
    entries: P | None = spec
    if spec is None and wafer is not None and sharding is not None and sharding.mesh == wafer.mesh:
        entries = _in_wafer_axes(sharding.spec, wafer)
    wafer = context.resolve(wafer)
    ndim = np.ndim(fields[0])
    if entries is None or not any(entries):
        entries = _default_spec(ndim, wafer) if spec is None else P()
    padded = (*entries, *[None] * (ndim - len(entries)))
    return FieldLayout(wafer, tuple(_plain_entry(entry) for entry in padded), chosen)


def _known_split(array: Any) -> NamedSharding | None:
    """How an array, or a tracer of one, is split over a mesh; None if it is not, or not known."""
    if isinstance(array, jax.core.Tracer):
        sharding = getattr(jax.typeof(array), "sharding", None)
    else:
        sharding = getattr(array, "sharding", None)
    split = isinstance(sharding, NamedSharding) and any(sharding.spec)
    return sharding if split else None


def _mesh_of_unknown_split(array: Any) -> AbstractMesh | None:
    """The mesh over whose Auto axes a tracer may be split; None if there are none.

    The axes over which `Wafer.virtual` spreads its PEs are no PEs themselves. Inside a `shard_map`,
    as everywhere in JAX, an array is what one device holds.
    """
    if not isinstance(array, jax.core.Tracer):
        return None
    mesh = jax.typeof(array).sharding.mesh
    manual = AxisType.Manual in mesh.axis_types
    spread = set(mesh.axis_names) & set(SPREAD.values())
    return mesh if _auto_axes(mesh) and not manual and not spread else None


def _auto_axes(mesh: Mesh | AbstractMesh) -> list[str]:
    """The Auto axes of `mesh` that have more than one device."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]


def _axes_that_split(sharding: NamedSharding) -> list[str]:
    names = [name for entry in sharding.spec for name in axes_of(entry)]
    return [name for name in names if sharding.mesh.shape[name] > 1]


def _unknown_split(operation: str, mesh: AbstractMesh) -> ValueError:
    axes = ", ".join(repr(name) for name in _auto_axes(mesh))
    return ValueError(
        f"{operation}: inside jit, grad and vmap JAX does not say how an array is split over the "
        f"Auto axes {axes} of its mesh, and the shape of the result depends on it; give "
        "wafer=wsekern.Wafer.of(mesh, y=..., x=...), or wafer=wsekern.Wafer.devices(1, 1) for an "
        "array that is not split, or make the mesh with Explicit axes"
    )


def _one_kind(
    operation: str, mesh: Mesh | AbstractMesh, used: Sequence[str], shape_depends: bool
) -> Sequence[str]:
    """The axes of one kind among those that split a field: of Explicit and Auto, the Explicit ones.

    Inside jit, JAX tells of no others. Along the others a field is whole on each device.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if len({kinds[name] for name in used}) < 2:
        return used
    if shape_depends:
        raise ValueError(
            f"{operation}: the field is split over the axes {list(used)}, which are "
            f"{[kinds[name].name for name in used]}, and the shape of the result depends on it; "
            "make them all Auto or all Explicit (axis_types= of the mesh), or give wafer="
        )
    return [name for name in used if kinds[name] == AxisType.Explicit]


def _wafer_of(mesh: Mesh | AbstractMesh, used: Sequence[str]) -> Wafer | None:
    """The mesh of an array as a wafer; None if it is split over no axis or over too many.

    The axes `used` become, from the last to the first, x, y and wafer: an array that is split as
    P("data", "model") has y = "data" and x = "model".
    """
    if not used or len(used) > len(AXES) or set(used) & set(SPREAD.values()):
        return None
    if isinstance(mesh, Mesh):
        cpu_threads.check_threads(mesh)
    axes = AXES[len(AXES) - len(used) :]
    sizes = {axis: mesh.shape[name] for axis, name in zip(axes, used, strict=True)}
    return Wafer(
        backend="devices",
        height=sizes.get(ROWS, 1),
        width=sizes[COLS],
        wafers=sizes.get(WAFERS, 1),
        mesh=mesh,
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
