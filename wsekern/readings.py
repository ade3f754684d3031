"""This file is how one kernel becomes a program, in each of the three readings of a wafer.

Devices and abstract: `jax.shard_map` over a mesh. Virtual: every dimension is split into (grid,
tile), and the kernel runs under one `jax.vmap` with an axis name for each axis of the grid. Where
virtual PEs are spread over devices, that happens on each of these, to its own block of PEs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wsekern import host_memory, identity
from wsekern.axes import AXES
from wsekern.context import within

if TYPE_CHECKING:
    from wsekern.wafer import Wafer


@dataclasses.dataclass(frozen=True)
class Specs:
    """The specs of operands and of results, hashable whatever pytrees they came as."""

    operands: tuple
    results: tuple

    @classmethod
    def of(cls, in_specs: Any, out_specs: Any) -> Specs:
        operands, results = (_flatten_specs(s) for s in (in_specs, out_specs))
        return cls(operands, results)

    @property
    def in_specs(self) -> Any:
        return jax.tree.unflatten(self.operands[1], self.operands[0])

    @property
    def out_specs(self) -> Any:
        return jax.tree.unflatten(self.results[1], self.results[0])


def axes_of(entry: None | str | tuple[str, ...]) -> tuple[str, ...]:
    """The axes that one entry of a spec splits its dimension over."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def program(
    wafer: Wafer,
    kernel: Callable,
    specs: Specs,
    replicated_by_construction: bool,
    donate: tuple[int, ...] = (),
) -> Callable:
    """The jitted program of `kernel`, made once for equal kernels, wafers and specs."""
    if wafer.reading != "devices" and (wafer.placement or wafer.corner != (0, 0)):
        # Where PEs lie on the wafer changes no result, and so no program.
        wafer = dataclasses.replace(wafer, placement=None, corner=(0, 0))
    key = identity.key(kernel)
    if key is None:
        return _Program(wafer, kernel, specs, replicated_by_construction, donate)
    keyed = _Keyed(key, identity.frozen(kernel))
    return _kept_program(keyed, wafer, specs, replicated_by_construction, donate)


def check_divides(wafer: Wafer, what: str, array: Any, spec: P) -> None:
    """Raises ValueError where a dimension of `array` does not divide by the PEs along it."""
    shape = jnp.shape(array)
    if len(spec) > len(shape):
        raise ValueError(
            f"{what}: an operand of shape {shape} has {len(shape)} dimensions, its spec {spec} "
            f"has {len(spec)}"
        )
    _check_axes(what, spec)
    for d, entry in enumerate(spec):
        parts = math.prod(wafer.axis_size(axis) for axis in axes_of(entry))
        if shape[d] % parts:
            raise ValueError(
                f"{what}: dimension {d} of an operand of shape {shape} does not divide by the "
                f"{parts} PEs along {entry!r}; pad it to {-(-shape[d] // parts) * parts}"
            )


def check_inside(wafer: Wafer, what: str, at: dict[str, int]) -> None:
    """Raises ValueError where no PE stands at the places `at`."""
    for axis, index in at.items():
        if not 0 <= index < wafer.axis_size(axis):
            raise ValueError(
                f"{what}: {axis}={index} is outside the grid, which has "
                f"{wafer.axis_size(axis)} along {axis}"
            )


def tile_at(wafer: Wafer, array: jax.Array, at: dict[str, int], spec: P) -> jax.Array:
    """The tile of an array laid out by `spec` that the PE at the places `at` holds."""
    slices = []
    for entry, length in zip(spec, array.shape, strict=False):
        index, parts = 0, 1
        for axis in axes_of(entry):
            index = index * wafer.axis_size(axis) + at[axis]
            parts *= wafer.axis_size(axis)
        slices.append(slice(index * length // parts, (index + 1) * length // parts))
    return array[tuple(slices)]


def _check_axes(what: str, spec: P) -> None:
    named = [axis for entry in spec for axis in axes_of(entry)]
    for axis in named:
        if axis not in AXES:
            raise ValueError(f"{what}: {axis!r} in {spec} is not one of {AXES}")
        if named.count(axis) > 1:
            raise ValueError(f"{what}: {axis!r} stands twice in {spec}; it splits one dimension")


def check_placed(wafer: Wafer, operand: Any) -> None:
    """Raises ValueError where `operand` is committed to devices that are not the wafer's."""
    if not isinstance(wafer.mesh, Mesh) or isinstance(operand, jax.core.Tracer):
        return
    if not isinstance(operand, jax.Array) or not operand.committed:
        return
    here = set(wafer.grid.devices.flat)
    if operand.sharding.device_set != here:
        raise ValueError(
            f"an operand of shape {operand.shape} is committed to "
            f"{len(operand.sharding.device_set)} device(s) ({operand.sharding}), which are not the "
            f"wafer's {len(here)}; move it with wafer.shard(array, spec)"
        )


def never_runs(wafer: Wafer, what: str) -> ValueError:
    """What to raise where an abstract wafer is asked to compute."""
    return ValueError(
        f"{what}: {wafer} is only traced over, never run on; use jax.eval_shape or "
        "jax.make_jaxpr, or a virtual wafer to compute"
    )


def constrain(wafer: Wafer, array: jax.Array, spec: P) -> jax.Array:
    """`array` laid out by `spec`, under jit, as the mesh's axis types want it said."""
    sharding = NamedSharding(wafer.grid, wafer.mesh_spec(spec))
    if explicit(wafer):
        return jax.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def explicit(wafer: Wafer) -> bool:
    """Whether the mesh's axes are Explicit: shardings are then part of an array's type."""
    if wafer.reading == "virtual":
        return False
    kinds = dict(zip(wafer.grid.axis_names, wafer.grid.axis_types, strict=True))
    return kinds[wafer.names[-1][1]] == AxisType.Explicit


class _Program:
    """A kernel over whole arrays: checks what it is handed, then calls one jitted function."""

    def __init__(self, wafer, kernel, specs, replicated_by_construction, donate):
        self.wafer = wafer
        self.specs = specs
        run = _virtual if wafer.reading == "virtual" else _sharded
        whole = run(wafer, kernel, specs, not replicated_by_construction)
        self.call = jax.jit(whole, donate_argnums=donate)
        self.needs: dict[Hashable, int] = {}  # bytes beside operands, by the shapes of these

    def __call__(self, *operands):
        specs = _broadcast(self.specs.in_specs, operands, "in_specs")
        leaves = jax.tree.leaves(operands)
        for operand, spec in zip(leaves, specs, strict=True):
            check_divides(self.wafer, "Wafer.map", operand, spec)
            check_placed(self.wafer, operand)
        if self.wafer.reading == "virtual" and _in_one_memory(self.wafer):
            return self._call_where_there_is_room(operands, leaves)
        try:
            return self.call(*operands)
        except jax.errors.JaxRuntimeError:
            if self.wafer.reading != "abstract":
                raise
            raise never_runs(self.wafer, "Wafer.map") from None

    def _call_where_there_is_room(self, operands, leaves):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            results = self.call(*operands)  # traced, and nothing taken yet
            host_memory.check_traced(self.wafer, operands, results)
            return results
        key = tuple((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        if key not in self.needs:
            results = jax.eval_shape(self.call, *operands)
            devices = 1 if self.wafer.mesh is None else self.wafer.grid.size
            self.needs[key] = host_memory.taken(self.call, operands, results, devices)
        if self.needs[key]:
            host_memory.check_room(self.wafer, self.needs[key], operands)
        return self.call(*operands)


def _in_one_memory(wafer: Wafer) -> bool:
    """Whether all PEs are in one memory, as on emulated devices; else XLA says which is full."""
    return wafer.mesh is None or wafer.platform == "cpu"


def _sharded(wafer: Wafer, kernel: Callable, specs: Specs, check: bool) -> Callable:
    def per_pe(*tiles):
        with within(wafer):
            return kernel(*tiles)

    def whole(*operands):
        named = functools.partial(jax.tree.map, wafer.mesh_spec)
        if explicit(wafer):
            flat, tree = jax.tree.flatten(operands)
            wanted = _broadcast(specs.in_specs, operands, "in_specs")
            laid_out = [constrain(wafer, a, s) for a, s in zip(flat, wanted, strict=True)]
            operands = jax.tree.unflatten(tree, laid_out)
        return jax.shard_map(
            per_pe,
            mesh=wafer.mesh,
            in_specs=named(specs.in_specs),
            out_specs=named(specs.out_specs),
            axis_names=_manual(wafer),
            check_vma=check,
        )(*operands)

    return whole


def _manual(wafer: Wafer) -> set[str]:
    # Explicit axes beside the wafer's, along which nothing is split by now, are taken in: jax 0.12
    # cannot lower a psum_scatter that leaves one out.
    kinds = dict(zip(wafer.grid.axis_names, wafer.grid.axis_types, strict=True))
    ours = {name for _, name in wafer.names}
    return ours | {name for name, kind in kinds.items() if kind == AxisType.Explicit}


def _virtual(wafer: Wafer, kernel: Callable, specs: Specs, check: bool) -> Callable:
    del check  # nothing to turn off: index 0 is taken of a replicated result
    sizes = {axis: wafer.axis_size(axis) // wafer.devices_along(axis) for axis in wafer.axes}

    def per_pe(*tiles):
        with within(wafer):
            return kernel(*tiles)

    def block(specs, *operands):
        flat, tree = jax.tree.flatten(operands)
        in_specs = _broadcast(specs.in_specs, operands, "in_specs")
        split = [_split(sizes, a, s) for a, s in zip(flat, in_specs, strict=True)]
        run = lambda *tiles: per_pe(*jax.tree.unflatten(tree, tiles))  # noqa: E731
        for axis in reversed(wafer.axes):  # the outermost axis is mapped last
            mapped = tuple(0 if axis in _named(s) else None for s in in_specs)
            run = jax.vmap(run, mapped, 0, axis_name=axis, axis_size=sizes[axis])
        results = run(*split)
        out_specs = _broadcast(specs.out_specs, results, "out_specs")
        flat, tree = jax.tree.flatten(results)
        joined = [_join(sizes, a, s) for a, s in zip(flat, out_specs, strict=True)]
        return jax.tree.unflatten(tree, joined)

    if wafer.mesh is None:
        return functools.partial(block, specs)
    return functools.partial(_spread, wafer, block, specs)


def _spread(wafer: Wafer, block: Callable, specs: Specs, *operands: Any) -> Any:
    """`block` of each device's PEs, on all devices."""
    # A device's block is one stretch of a dimension only where that lies along one axis.
    apart = Specs.of(*(jax.tree.map(_apart, s) for s in (specs.in_specs, specs.out_specs)))
    flat, tree = jax.tree.flatten(operands)
    in_specs = _broadcast(specs.in_specs, operands, "in_specs")
    cut = [_cut_apart(wafer, a, s) for a, s in zip(flat, in_specs, strict=True)]
    mesh_specs = functools.partial(jax.tree.map, wafer.mesh_spec)
    results = jax.shard_map(
        functools.partial(block, apart),
        mesh=wafer.mesh,
        in_specs=mesh_specs(apart.in_specs),
        out_specs=mesh_specs(apart.out_specs),
        check_vma=False,  # it knows nothing of the axes of vmap
    )(*jax.tree.unflatten(tree, cut))
    out_specs = _broadcast(specs.out_specs, results, "out_specs")
    flat, tree = jax.tree.flatten(results)
    whole = [_put_together(a, s) for a, s in zip(flat, out_specs, strict=True)]
    return jax.tree.unflatten(tree, whole)


def _apart(spec: P) -> P:
    """`spec` with an entry of its own for each axis."""
    return P(*(axis for entry in spec for axis in axes_of(entry) or (None,)))


def _cut_apart(wafer: Wafer, array: jax.Array, spec: P) -> jax.Array:
    shape: list[int] = []
    for d, length in enumerate(jnp.shape(array)):
        *outer, _ = axes_of(spec[d]) or (None,) if d < len(spec) else (None,)
        counts = [wafer.axis_size(axis) for axis in outer]
        shape += [*counts, length // math.prod(counts)]
    return jnp.reshape(array, shape)


def _put_together(array: jax.Array, spec: P) -> jax.Array:
    shape, rest = [], list(array.shape)
    for entry in spec:
        axes = len(axes_of(entry)) or 1
        shape.append(math.prod(rest[:axes]))
        rest = rest[axes:]
    return array.reshape(*shape, *rest)


def _split(along: dict[str, int], array: jax.Array, spec: P) -> jax.Array:
    """`array` with one leading dimension for each axis of the grid that `spec` names."""
    sizes: list[int] = []
    leading: dict[str, int] = {}
    tile: list[int] = []
    for d, length in enumerate(jnp.shape(array)):
        entry = axes_of(spec[d]) if d < len(spec) else ()
        for axis in (a for a in entry if a in along):
            leading[axis] = len(sizes)
            sizes.append(along[axis])
            length //= along[axis]
        tile.append(len(sizes))
        sizes.append(length)
    order = [leading[axis] for axis in along if axis in leading]
    return jnp.reshape(array, sizes).transpose(*order, *tile)


def _join(along: dict[str, int], blocks: jax.Array, spec: P) -> jax.Array:
    """The whole array from blocks with one leading dimension for every axis of the grid."""
    named = _named(spec)
    if len(spec) > blocks.ndim - len(along):
        raise ValueError(
            f"Wafer.map: a result of a PE has {blocks.ndim - len(along)} dimensions, its spec "
            f"{spec} has {len(spec)}"
        )
    blocks = blocks[tuple(slice(None) if axis in named else 0 for axis in along)]
    leading = [axis for axis in along if axis in named]
    order, shape = [], []
    for d, length in enumerate(blocks.shape[len(leading) :]):
        split = [a for a in (axes_of(spec[d]) if d < len(spec) else ()) if a in leading]
        order += [leading.index(axis) for axis in split] + [len(leading) + d]
        for axis in split:
            length *= along[axis]
        shape.append(length)
    return blocks.transpose(order).reshape(shape)


def _named(spec: P) -> set[str]:
    return {axis for entry in spec for axis in axes_of(entry)}


def _broadcast(specs: Any, tree: Any, what: str) -> list[P]:
    """One spec for each leaf of `tree`, from a pytree prefix of specs."""
    try:
        full = jax.tree.map(lambda s, sub: jax.tree.map(lambda _: s, sub), specs, tree)
    except ValueError as error:
        raise ValueError(
            f"Wafer.map: {what}={specs} does not match the structure of what it describes, "
            f"{jax.tree.structure(tree)}"
        ) from error
    return jax.tree.leaves(full)


def _flatten_specs(specs: Any) -> tuple:
    leaves, tree = jax.tree.flatten(specs)
    for leaf in leaves:
        if not isinstance(leaf, P):
            raise ValueError(
                f"Wafer.map: {leaf!r} stands where a jax.sharding.PartitionSpec belongs; "
                "P() is whole on every PE"
            )
        _check_axes("Wafer.map", leaf)
    return tuple(leaves), tree


@dataclasses.dataclass(frozen=True)
class _Keyed:
    key: Hashable
    kernel: Callable = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4096)
def _kept_program(kernel: _Keyed, wafer, specs, replicated_by_construction, donate) -> _Program:
    return _Program(wafer, kernel.kernel, specs, replicated_by_construction, donate)
