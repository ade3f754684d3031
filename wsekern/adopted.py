"""This file is which axes of a user's own mesh can be a wafer's."""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import AxisType, Mesh

from wsekern.axes import ROWS, SPREAD


def check(mesh: Mesh, given: Mapping[str, str]) -> None:
    """Raises ValueError where the axes of `mesh` that `given` names make no wafer.

    Args:
      mesh: the user's.
      given: what it calls each axis of the wafer.
    """
    for axis, name in given.items():
        if name not in mesh.axis_names:
            raise ValueError(
                f"Wafer.of: {axis}={name!r} is not an axis of the mesh, which has "
                f"{tuple(mesh.axis_names)}"
            )
    if len(set(given.values())) < len(given):
        raise ValueError(f"Wafer.of: {given} names one mesh axis twice")
    if kept := set(mesh.axis_names) & set(SPREAD.values()):
        raise ValueError(
            f"Wafer.of: {sorted(kept)} are the axes over which Wafer.virtual spreads PEs; take "
            "that wafer, or rename them"
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if len({kinds[name] for name in given.values()}) > 1:
        raise ValueError(
            f"Wafer.of: the axes are {[str(kinds[n]) for n in given.values()]}; make them all "
            "Auto or all Explicit (axis_types= of the mesh)"
        )
    if kinds[given[ROWS]] == AxisType.Auto and AxisType.Explicit in kinds.values():
        raise ValueError(
            "Wafer.of: the axes named are Auto, and the mesh has Explicit ones beside them; "
            "make all alike (axis_types= of the mesh)"
        )
