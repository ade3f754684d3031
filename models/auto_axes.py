"""Run a model's programs over Auto axes where the user's mesh has Explicit ones.

Between the operations of a wafer a model computes with plain `jax.numpy`, whose arrays XLA splits.
On Explicit axes JAX refuses some of these, as look-ups along a dimension that is split.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from wsekern.wafer import context, on_devices


def to_auto_axes(operands: Any) -> tuple[Any, Callable[[], contextlib.ExitStack]]:
    """A program's operands on Auto axes of their devices, and what makes the context to run it in.

    No number moves to another device.
    """

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not _is_explicit(sharding.mesh):
            return leaf
        return jax.device_put(leaf, NamedSharding(_auto(sharding.mesh), sharding.spec))

    return jax.tree.map(place, operands), _auto_context


def _auto_context() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    if _is_explicit(jax.sharding.get_abstract_mesh()):
        stack.enter_context(jax.set_mesh(_auto(jax.sharding.get_mesh())))
    wafer = context.resolve(None)
    if wafer is not None and on_devices.explicit(wafer):
        stack.enter_context(dataclasses.replace(wafer, mesh=_auto(wafer.device_mesh)))
    return stack


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _auto(mesh: Any) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
