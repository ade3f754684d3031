"""This file is `Wafer`: which PEs, in which grid, read in which of three ways.

A kernel runs over real devices (`jax.shard_map` on a mesh), over virtual PEs (nested `jax.vmap` on
one device) or abstractly (a trace over an `AbstractMesh`); `Wafer.map` is its door to all three.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from wsekern import context, readings
from wsekern.axes import AXES, COLS, ROWS, WAFERS
from wsekern.hardware import Machine

TILED = P(ROWS, COLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wafer:
    """A grid of PEs and how programs on it are read; immutable, equal by value.

    Make one with `Wafer.devices`, `Wafer.of`, `Wafer.virtual` or `Wafer.abstract`. As a context
    manager it is the wafer that operations use when they are given none.
    """

    reading: Literal["devices", "virtual", "abstract"]
    height: int  # PEs north to south
    width: int  # PEs west to east
    wafers: int = 1
    mesh: Mesh | AbstractMesh | None = None  # None for virtual PEs
    machine: Machine | None = None  # what the PEs are taken to be; None for plain devices
    # What the mesh calls each axis; an axis that it lacks has size 1.
    names: tuple[tuple[str, str], ...] = ((ROWS, ROWS), (COLS, COLS))

    def __post_init__(self):
        for name in ("height", "width", "wafers"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Wafer: {name} is {value!r}, it must be an integer of 1 or more")

    @classmethod
    def devices(
        cls, height: int, width: int, wafers: int = 1, devices: Sequence[jax.Device] | None = None
    ) -> "Wafer":
        """A wafer of real or CPU-emulated devices, neighbours in the grid near in the machine.

        Args:
          height: rows of the grid.
          width: columns of the grid.
          wafers: how many such grids work together.
          devices: which devices; by default the first of `jax.devices()`, in the order that suits
            their physical topology.

        Raises:
          ValueError: the grid is not positive, or needs more devices than there are.
        """
        shape = cls(reading="devices", height=height, width=width, wafers=wafers)
        available = list(jax.devices() if devices is None else devices)
        if shape.size > len(available):
            raise ValueError(
                f"Wafer.devices: {_grid(shape)} needs {shape.size} devices, there are "
                f"{len(available)}; ask for a smaller grid, or on a CPU call "
                f"wsekern.emulate_devices({shape.size}) before jax starts"
            )
        axes = shape.axes if wafers == 1 else AXES
        grid = tuple(shape.axis_size(axis) for axis in axes)
        chosen = available[: shape.size]
        ordered = (
            mesh_utils.create_device_mesh(grid, chosen)
            if devices is None
            else np.array(chosen, dtype=object).reshape(grid)
        )
        mesh = Mesh(ordered, axes, axis_types=(AxisType.Auto,) * len(axes))
        return dataclasses.replace(shape, mesh=mesh, names=_same(axes))

    @classmethod
    def of(cls, mesh: Mesh, y: str, x: str, wafer: str | None = None) -> "Wafer":
        """The mesh you already have, Auto or Explicit, as a wafer.

        Operations then run on its arrays inside your own jit. Along mesh axes not named here every
        PE does the same: an operand that is split along one is gathered first on Explicit axes, and
        as XLA's partitioner sees fit on Auto ones. An axis of data parallelism is best named
        `wafer`.

        Args:
          mesh: your mesh.
          y: the name of its axis that counts rows.
          x: the name of its axis that counts columns.
          wafer: the name of its axis that counts wafers, if it has one.

        Raises:
          ValueError: a name is not an axis of the mesh, is used twice, or the named axes mix
            Explicit with Auto.
        """
        given = {ROWS: y, COLS: x} | ({WAFERS: wafer} if wafer is not None else {})
        for axis, name in given.items():
            if name not in mesh.axis_names:
                raise ValueError(
                    f"Wafer.of: {axis}={name!r} is not an axis of the mesh, which has "
                    f"{tuple(mesh.axis_names)}"
                )
        if len(set(given.values())) < len(given):
            raise ValueError(f"Wafer.of: {given} names one mesh axis twice")
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        if len({kinds[name] for name in given.values()}) > 1:
            raise ValueError(
                f"Wafer.of: the axes are {[str(kinds[n]) for n in given.values()]}; make them all "
                "Auto or all Explicit (axis_types= of the mesh)"
            )
        if kinds[y] == AxisType.Auto and AxisType.Explicit in kinds.values():
            raise ValueError(
                "Wafer.of: the axes named are Auto, and the mesh has Explicit ones beside them; "
                "make all alike (axis_types= of the mesh)"
            )
        return cls(
            reading="devices",
            height=mesh.shape[y],
            width=mesh.shape[x],
            wafers=1 if wafer is None else mesh.shape[wafer],
            mesh=mesh,
            names=tuple((axis, given[axis]) for axis in AXES if axis in given),
        )

    @classmethod
    def virtual(cls, machine: Machine, height: int, width: int, wafers: int = 1) -> "Wafer":
        """PEs of a wafer-scale machine, each with its own tile, all on one device.

        Results are those of `height * width * wafers` PEs, exactly; the time is one device's.

        Raises:
          ValueError: the grid is not positive or does not fit the machine's usable rectangle.
        """
        _check_fits("Wafer.virtual", machine, height, width)
        return _present(
            cls(reading="virtual", height=height, width=width, wafers=wafers, machine=machine)
        )

    @classmethod
    def abstract(
        cls,
        machine: Machine,
        height: int | None = None,
        width: int | None = None,
        wafers: int = 1,
    ) -> "Wafer":
        """A wafer that programs are traced over but never run on; no device is needed.

        Args:
          machine: what it is made of.
          height: rows; by default all that a program can use.
          width: columns; likewise.
          wafers: how many such wafers work together.

        Raises:
          ValueError: the grid is not positive or does not fit the machine's usable rectangle.
        """
        height = machine.usable_height if height is None else height
        width = machine.usable_width if width is None else width
        _check_fits("Wafer.abstract", machine, height, width)
        shape = _present(
            cls(reading="abstract", height=height, width=width, wafers=wafers, machine=machine)
        )
        sizes = tuple(shape.axis_size(axis) for axis in shape.axes)
        mesh = AbstractMesh(sizes, shape.axes, axis_types=(AxisType.Auto,) * len(sizes))
        return dataclasses.replace(shape, mesh=mesh)

    @property
    def size(self) -> int:
        """How many PEs there are, over all wafers."""
        return self.height * self.width * self.wafers

    @property
    def grid(self) -> Mesh | AbstractMesh:
        """The mesh, of a wafer that has one."""
        if self.mesh is None:
            raise ValueError(f"{self!r} has no mesh: virtual PEs all live on one device")
        return self.mesh

    @property
    def platform(self) -> str | None:
        """What its programs run on: "cpu", "gpu" or "tpu"; None for one that never runs."""
        if self.reading == "abstract":
            return None
        if self.reading == "virtual":
            return jax.default_backend()
        return self.grid.devices.flat[0].platform

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that this wafer has, outermost first, as kernels name them."""
        return tuple(axis for axis, _ in self.names)

    def axis_size(self, axis: str) -> int:
        """How many PEs stand along `axis`: `"y"`, `"x"` or `"wafer"`."""
        return {ROWS: self.height, COLS: self.width, WAFERS: self.wafers}[axis]

    def axis_name(self, axis: str) -> str | None:
        """What the mesh calls `axis`; None where it has no such axis."""
        return dict(self.names).get(axis)

    def __enter__(self) -> "Wafer":
        context.enter(self)
        return self

    def __exit__(self, *exception) -> None:
        context.leave()

    def map(
        self,
        kernel: Callable[..., Any],
        *,
        in_specs: Any,
        out_specs: Any,
        replicated_by_construction: bool = False,
        donate_argnums: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """`kernel`, a function of one PE's tiles, as a function of whole arrays.

        The meaning is `jax.shard_map`'s in every reading: an axis of the wafer that a spec does not
        name is one along which an operand is handed whole to every PE, and along which a result
        must be the same on every PE. The program is jitted, and kept for the next call with an
        equal kernel: partials and lambdas are equal if their functions and all they hold are.

        Args:
          kernel: computes with `jnp` and communicates through `wsekern.fabric` only. Differentiate
            around `map`, never inside the kernel. What a lambda holds is read when `map` is called;
            one that holds an array is compiled each time, so hand arrays over as operands.
          in_specs: a `PartitionSpec` in the names `"y"`, `"x"` and `"wafer"` for every operand, or
            a tuple of them (pytree prefixes, as in shard_map).
          out_specs: likewise for the results.
          replicated_by_construction: True where a result that is the same on every PE cannot be
            seen to be so by JAX (one passed round a ring, say). It turns JAX's check off for this
            map: compare all PEs' copies in a test, and test the gradient. Virtual PEs are never
            compared: the first one's result is taken.
          donate_argnums: operands whose memory the results may take, as in `jax.jit`.

        Raises:
          ValueError: a spec is none or names an axis that does not exist, or one twice; from the
            returned function: an operand's size does not divide by the PEs along it, or it lies on
            other devices.
        """
        specs = readings.Specs.of(in_specs, out_specs)
        return readings.program(self, kernel, specs, replicated_by_construction, donate_argnums)

    def mesh_spec(self, spec: P) -> P:
        """`spec` in the mesh's own names, without the axes that the mesh lacks."""

        def rename(entry):
            names = [self.axis_name(a) for a in readings.axes_of(entry)]
            names = [n for n in names if n is not None]
            return None if not names else names[0] if len(names) == 1 else tuple(names)

        return P(*(rename(entry) for entry in spec))

    def sharding(self, spec: P) -> Sharding:
        """Where an array laid out by `spec` lives; for `jax.device_put` and `out_shardings=`.

        The virtual reading keeps every array whole on one device.
        """
        if self.reading == "virtual":
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.grid, self.mesh_spec(spec))

    def shard(self, array: jax.typing.ArrayLike, spec: P = TILED) -> jax.Array:
        """`array` laid out by `spec`, inside or outside jit.

        Raises:
          ValueError: a size does not divide by the PEs along it.
        """
        readings.check_divides(self, "Wafer.shard", array, spec)
        if self.reading == "virtual":
            return jnp.asarray(array)
        if isinstance(array, jax.core.Tracer):
            return readings.constrain(self, array, spec)
        if self.reading == "abstract":
            raise readings.never_runs(self, "Wafer.shard")
        return jax.device_put(array, self.sharding(spec))

    def tile(self, array: jax.Array, y: int, x: int, wafer: int = 0, spec: P = TILED) -> jax.Array:
        """The tile of `array` that PE (`y`, `x`) holds when it is laid out by `spec`.

        Raises:
          ValueError: there is no such PE, or a size does not divide by the PEs along it.
        """
        at = {ROWS: y, COLS: x, WAFERS: wafer}
        for axis, index in at.items():
            if not 0 <= index < self.axis_size(axis):
                raise ValueError(
                    f"Wafer.tile: {axis}={index} is outside the grid, which has "
                    f"{self.axis_size(axis)} along {axis}"
                )
        readings.check_divides(self, "Wafer.tile", array, spec)
        if self.reading == "devices" and readings.explicit(self):
            array = readings.constrain(self, array, P())  # a split dimension could not be cut
        slices = []
        for entry, length in zip(spec, array.shape, strict=False):
            index, parts = 0, 1
            for axis in readings.axes_of(entry):
                index = index * self.axis_size(axis) + at[axis]
                parts *= self.axis_size(axis)
            slices.append(slice(index * length // parts, (index + 1) * length // parts))
        return array[tuple(slices)]

    def __repr__(self) -> str:
        of = f" of {self.machine.name}" if self.machine else ""
        return f"<Wafer {self.reading} {_grid(self)}{of}>"


def _same(axes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, axis) for axis in axes)


def _present(wafer: Wafer) -> Wafer:
    return dataclasses.replace(wafer, names=_same(AXES if wafer.wafers > 1 else (ROWS, COLS)))


def _grid(wafer: Wafer) -> str:
    grid = f"{wafer.height}x{wafer.width}"
    return grid if wafer.wafers == 1 else f"{wafer.wafers}x{grid}"


def _check_fits(what: str, machine: Machine, height: int, width: int) -> None:
    long, short = max(height, width), min(height, width)
    usable = (machine.usable_height, machine.usable_width)
    if long > max(usable) or short > min(usable):
        raise ValueError(
            f"{what}: {height}x{width} PEs do not fit {machine.name}, whose programs can use "
            f"{usable[0]}x{usable[1]}, either way round"
        )
