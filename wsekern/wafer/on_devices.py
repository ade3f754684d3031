"""Kernels on real or emulated devices: `jax.shard_map` over a mesh, the user's own too."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import context
from wsekern.wafer.axes import ROWS, SPREAD, axes_of
from wsekern.wafer.specs import Specs, broadcast_specs

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer


def map_on_devices(wafer: "Wafer", kernel: Callable, specs: Specs, check: bool) -> Callable:
    """`kernel` of one PE's tiles as a function of whole arrays, each PE on a device of its own.

    Args:
      check: whether JAX checks that what a spec calls replicated is the same on every PE.
    """

    def per_pe(*tiles: Any) -> Any:
        with context.within(wafer):
            return kernel(*tiles)

    def whole(*operands: Any) -> Any:
        if explicit(wafer):
            leaves, tree = jax.tree.flatten(operands)
            wanted = broadcast_specs(specs.in_specs, operands, "in_specs")
            laid_out = [constrain(wafer, a, s) for a, s in zip(leaves, wanted, strict=True)]
            operands = jax.tree.unflatten(tree, laid_out)
        if wafer.backend == "devices" and isinstance(wafer.mesh, AbstractMesh):
            operands = jax.tree.map(keep_in_gradient, operands)
        return run_on_devices(wafer, per_pe, specs, check)(*operands)

    return whole


def leave_to_xla(wafer: "Wafer", function: Callable, specs: Specs) -> Callable:
    """`function` of whole arrays, laid out by `specs`; XLA splits it between the devices."""

    def lay_out(arrays: Any, wanted: Any, name: str) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        placed = zip(leaves, broadcast_specs(wanted, arrays, name), strict=True)
        return jax.tree.unflatten(tree, [_constrain_named(wafer, *pair) for pair in placed])

    def laid_out(*operands: Any) -> Any:
        with context.within(wafer):
            results = function(*lay_out(operands, specs.in_specs, "in_specs"))
        return lay_out(results, specs.out_specs, "out_specs")

    def whole(*operands: Any) -> Any:
        if isinstance(wafer.mesh, AbstractMesh):
            operands = jax.tree.map(keep_in_gradient, operands)
        if not explicit(wafer):
            return laid_out(*operands)
        shardings = jax.tree.map(wafer.sharding, specs.out_specs)
        return jax.sharding.auto_axes(laid_out, out_sharding=shardings)(*operands)

    return whole


def _constrain_named(wafer: "Wafer", array: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """`array` laid out by `spec`; the dimensions that it leaves out lie as XLA sees fit.

    The mesh may have axes beside the wafer's, which split a batch.
    """
    entries = [*wafer.mesh_spec(spec), *[None] * (array.ndim - len(spec))]
    free = P(*(P.UNCONSTRAINED if entry is None else entry for entry in entries))
    # Explicit axes are Auto ones where this runs, which only the mesh in force knows.
    mesh = jax.sharding.get_abstract_mesh() if explicit(wafer) else wafer.device_mesh
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, free))


@jax.custom_jvp
def keep_in_gradient(operand: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`operand`; a gradient with respect to it reads it too.

    A mesh taken from an operand's type names no devices. JAX takes them from the arguments of the
    program, and drops the arguments that are not read: of a linear kernel's gradient, all of them.
    """
    return operand


@keep_in_gradient.defjvp
def _keep_in_gradient_jvp(
    primals: tuple[Shaped[Array, "..."]], tangents: tuple[Any]
) -> tuple[Shaped[Array, "..."], Any]:
    [operand], [tangent] = primals, tangents
    if tangent.dtype == jax.dtypes.float0:
        return operand, tangent
    # Always true, which XLA knows and JAX does not.
    read = jnp.isfinite(operand) | True
    return operand, jnp.where(read, tangent, jnp.zeros_like(tangent))


def run_on_devices(wafer: "Wafer", per_device: Callable, specs: Specs, check: bool) -> Callable:
    """`jax.shard_map` of `per_device` over the wafer's mesh; `specs` are in the wafer's axes."""
    in_mesh_axes = functools.partial(jax.tree.map, wafer.mesh_spec)
    return jax.shard_map(
        per_device,
        mesh=wafer.mesh,
        in_specs=in_mesh_axes(specs.in_specs),
        out_specs=in_mesh_axes(specs.out_specs),
        axis_names=_manual_axes(wafer),
        check_vma=check,
    )


def explicit(wafer: "Wafer") -> bool:
    """Whether the mesh's axes are Explicit, so that shardings are part of an array's type."""
    if wafer.backend == "virtual":
        return False
    kinds = dict(zip(wafer.device_mesh.axis_names, wafer.device_mesh.axis_types, strict=True))
    return kinds[wafer.names[-1][1]] == AxisType.Explicit


def constrain(wafer: "Wafer", array: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """`array` laid out by `spec` under jit, by the function that suits the mesh's axis types."""
    sharding = NamedSharding(wafer.device_mesh, wafer.mesh_spec(spec))
    if explicit(wafer):
        return jax.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def on_auto_axes(
    operation: Callable[[Shaped[Array, "..."]], Shaped[Array, "..."]],
    array: Shaped[Array, "..."],
    *,
    like: Shaped[Array, "..."],
    shape: tuple[int, ...],
) -> Shaped[Array, "..."]:
    """`operation(array)`, with the moves that XLA chooses, on Explicit axes of a mesh too.

    Args:
      operation: of whole arrays, such as slices of split dimensions, which Explicit axes refuse.
      array: its operand.
      like: the result is split as this array is, in the dimensions that divide by the devices.
      shape: of the result.
    """
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec):
        return operation(array)
    devices = [math.prod(sharding.mesh.shape[name] for name in axes_of(e)) for e in sharding.spec]
    kept = zip(sharding.spec, shape, devices, strict=True)
    spec = P(*(entry if size % count == 0 else None for entry, size, count in kept))
    result = NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(operation, out_sharding=result)(array)


def check_placed(wafer: "Wafer", operand: Any) -> None:
    """Raises ValueError if `operand` is committed to devices that are not the wafer's."""
    if not isinstance(wafer.mesh, Mesh) or isinstance(operand, jax.core.Tracer):
        return
    if not isinstance(operand, jax.Array) or not operand.committed:
        return
    own_devices = set(wafer.device_mesh.devices.flat)
    if operand.sharding.device_set != own_devices:
        raise ValueError(
            f"an operand of shape {operand.shape} is committed to "
            f"{len(operand.sharding.device_set)} device(s) ({operand.sharding}), which are not the "
            f"wafer's {len(own_devices)}; move it with wafer.shard(array, spec)"
        )


def check_mesh(mesh: Mesh, names: Mapping[str, str]) -> None:
    """Raises ValueError if the axes of `mesh` that `names` gives cannot make a wafer.

    Args:
      mesh: the user's own.
      names: the mesh's name for each axis of the wafer.
    """
    for axis, name in names.items():
        if name not in mesh.axis_names:
            raise ValueError(
                f"Wafer.of: {axis}={name!r} is not an axis of the mesh, which has "
                f"{tuple(mesh.axis_names)}"
            )
    if len(set(names.values())) < len(names):
        raise ValueError(f"Wafer.of: {names} names one mesh axis twice")
    if reserved := set(mesh.axis_names) & set(SPREAD.values()):
        raise ValueError(
            f"Wafer.of: {sorted(reserved)} are the axes over which Wafer.virtual spreads PEs; take "
            "that wafer, or rename them"
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if len({kinds[name] for name in names.values()}) > 1:
        raise ValueError(
            f"Wafer.of: the axes are {[str(kinds[n]) for n in names.values()]}; make them all "
            "Auto or all Explicit (axis_types= of the mesh)"
        )
    if kinds[names[ROWS]] == AxisType.Auto and AxisType.Explicit in kinds.values():
        raise ValueError(
            "Wafer.of: the axes named are Auto, and the mesh has Explicit ones beside them; "
            "make all alike (axis_types= of the mesh)"
        )


def _manual_axes(wafer: "Wafer") -> set[str]:
    mesh = wafer.device_mesh
    if wafer.backend == "virtual":
        return set(mesh.axis_names)
    # Beside Explicit axes every other one is manual too, although nothing is split along it by now:
    # jax 0.12 cannot lower a psum_scatter that leaves an Explicit one out.
    return set(mesh.axis_names) if explicit(wafer) else {name for _, name in wafer.names}
