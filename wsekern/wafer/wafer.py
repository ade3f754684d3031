"""This file is `Wafer`: which PEs, in which grid, read in which of three ways.

A kernel runs over real devices (`jax.shard_map` on a mesh), over virtual PEs (nested `jax.vmap` on
one device) or abstractly (a trace over an `AbstractMesh`); `Wafer.map` is its door to all three.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from wsekern.hardware import Machine
from wsekern.wafer import context, on_devices, program, regions, virtual
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.placement import failed_devices
from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.place import Placement, check_fits, place_on
from wsekern.wafer.specs import Specs, check_divides, check_inside, tile_at

TILED = P(ROWS, COLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wafer:
    """A grid of PEs and how programs on it are read; immutable, equal by value.

    Make one with `Wafer.devices`, `Wafer.of`, `Wafer.virtual` or `Wafer.abstract`. As a context
    manager it is the wafer that operations use when they are given none.
    """

    backend: Literal["devices", "virtual", "abstract"]
    height: int  # PEs north to south
    width: int  # PEs west to east
    wafers: int = 1
    mesh: Mesh | AbstractMesh | None = None  # None for virtual PEs on one device
    machine: Machine | None = None  # what the PEs are taken to be; None for plain devices
    # What the mesh calls each axis; an axis that it lacks has size 1.
    names: tuple[tuple[str, str], ...] = ((ROWS, ROWS), (COLS, COLS))
    placement: Placement | None = None  # on which physical PEs; None: side by side
    corner: tuple[int, int] = (0, 0)  # of a region, the row and column it begins at

    def __post_init__(self):
        for name in ("height", "width", "wafers"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Wafer: {name} is {value!r}, it must be an integer of 1 or more")

    @classmethod
    def devices(
        cls,
        height: int,
        width: int,
        wafers: int = 1,
        devices: Sequence[jax.Device] | None = None,
        *,
        failed: Collection[int] = (),
    ) -> "Wafer":
        """A wafer of real or CPU-emulated devices, neighbors in the grid near in the machine.

        Args:
          height: rows of the grid.
          width: columns of the grid.
          wafers: how many such grids work together.
          devices: which devices; by default the first of `jax.devices()`, in the order that suits
            their physical topology.
          failed: ids of devices to leave out.

        Raises:
          ValueError: the grid is not positive, or needs more devices than there are (and what the
            largest grid is without those that failed), or `failed` names a stranger.
        """
        shape = cls(backend="devices", height=height, width=width, wafers=wafers)
        available = list(jax.devices() if devices is None else devices)
        at_places = None
        if failed:
            available = failed_devices.working_devices(available, failed)
            failed_devices.check_enough(height, width, wafers, len(available), len(set(failed)))
            at_places = failed_devices.rectangle(available, height * wafers, width)
        if shape.size > len(available):
            raise ValueError(
                f"Wafer.devices: {_grid_text(shape)} needs {shape.size} devices, there are "
                f"{len(available)}; ask for a smaller grid, or on a CPU call "
                f"wsekern.emulate_devices({shape.size}) before jax starts"
            )
        axes = shape.axes if wafers == 1 else AXES
        grid = tuple(shape.axis_size(axis) for axis in axes)
        chosen = available[: shape.size]
        if at_places is None and devices is None and not failed:
            ordered = mesh_utils.create_device_mesh(grid, chosen)
        else:
            ordered = np.array(chosen if at_places is None else at_places, object).reshape(grid)
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
        on_devices.check_mesh(mesh, given)
        return cls(
            backend="devices",
            height=mesh.shape[y],
            width=mesh.shape[x],
            wafers=1 if wafer is None else mesh.shape[wafer],
            mesh=mesh,
            names=tuple((axis, given[axis]) for axis in AXES if axis in given),
        )

    @classmethod
    def virtual(
        cls,
        machine: Machine,
        height: int,
        width: int,
        wafers: int = 1,
        *,
        devices: "tuple[int, ...] | Wafer | None" = None,
        defects: Defects | None = None,
        folded: bool = False,
    ) -> "Wafer":
        """PEs of a wafer-scale machine, each with its own tile, on one device or in blocks on more.

        Results are those of `height * width * wafers` PEs, exactly; the time is the devices'.

        Args:
          machine: what it is made of.
          height: rows of PEs.
          width: columns.
          wafers: how many such wafers work together.
          devices: the grid of devices, `(2, 4)` or with the wafers first `(2, 2, 4)`, each of which
            has a block of neighboring PEs and sends others their edges; or a wafer that
            `Wafer.devices` made, to say which devices.
          defects: of the physical wafer, of each alike; the PEs are placed around them
            (`wsekern.wafer.placement.place`), which no result shows, only `wsekern.estimate`.
          folded: whether both axes are folded on the wafer: neighbors in a ring, its two ends too,
            are then two hops apart, and so are neighbors on a line.

        Raises:
          ValueError: the grid is not positive, does not fit the machine's usable rectangle, or
            what the defects leave of it (says the largest that does), or does not divide by the
            devices.
        """
        check_fits("Wafer.virtual", machine, height, width)
        wafer = cls(backend="virtual", height=height, width=width, wafers=wafers, machine=machine)
        wafer = _present(wafer)
        placement = place_on(machine, height, width, defects, folded)
        if devices is not None:
            over = (
                devices
                if isinstance(devices, Wafer)
                else cls.devices(*virtual.device_grid(devices))
            )
            wafer = dataclasses.replace(wafer, mesh=virtual.mesh_over(over, wafer))
        return dataclasses.replace(wafer, placement=placement)

    @classmethod
    def abstract(
        cls,
        machine: Machine,
        height: int | None = None,
        width: int | None = None,
        wafers: int = 1,
        *,
        defects: Defects | None = None,
        folded: bool = False,
    ) -> "Wafer":
        """A wafer that programs are traced over but never run on; no device is needed.

        Args:
          machine: what it is made of.
          height: rows; by default all that a program can use.
          width: columns; likewise.
          wafers: how many such wafers work together.
          defects: as in `virtual`.
          folded: as in `virtual`.

        Raises:
          ValueError: as `virtual`.
        """
        height = machine.usable_height if height is None else height
        width = machine.usable_width if width is None else width
        check_fits("Wafer.abstract", machine, height, width)
        shape = _present(
            cls(backend="abstract", height=height, width=width, wafers=wafers, machine=machine)
        )
        sizes = tuple(shape.axis_size(axis) for axis in shape.axes)
        mesh = AbstractMesh(sizes, shape.axes, axis_types=(AxisType.Auto,) * len(sizes))
        placement = place_on(machine, height, width, defects, folded)
        return dataclasses.replace(shape, mesh=mesh, placement=placement)

    def region(self, y: int, x: int, height: int, width: int) -> "Wafer":
        """The PEs of a sub-rectangle, as a wafer of their own, for one of several programs.

        Programs on regions that share no PE do not meet: on devices they run side by side. A region
        has its PEs' places on the physical wafer.

        Args:
          y: the row of this wafer that it begins at.
          x: the column.
          height: its rows.
          width: its columns.

        Raises:
          ValueError: it is not inside this wafer, or of a spread one, is no blocks of devices.
        """
        regions.check_region(y, x, height, width, self)
        names, placement = dict(self.names), self.placement
        part = {names[ROWS]: (y, height), names[COLS]: (x, width)}
        if self.backend == "virtual":
            part = regions.devices_of_blocks({ROWS: (y, height), COLS: (x, width)}, self)
        return dataclasses.replace(
            self,
            height=height,
            width=width,
            mesh=regions.submesh(self.mesh, part),
            placement=None if placement is None else placement.region(y, x, height, width),
            corner=(self.corner[0] + y, self.corner[1] + x),
        )

    def split(self, rows: int, columns: int) -> tuple["Wafer", ...]:
        """This wafer cut into `rows * columns` regions, row by row, as equal in size as can be.

        Raises:
          ValueError: there are not so many PEs along an axis.
        """
        down = regions.split_evenly("rows", self.height, rows)
        across = regions.split_evenly("columns", self.width, columns)
        return tuple(self.region(y, x, h, w) for y, h in down for x, w in across)

    @property
    def size(self) -> int:
        """How many PEs there are, over all wafers."""
        return self.height * self.width * self.wafers

    @property
    def grid(self) -> tuple[int, int, int]:
        """(wafers, height, width), outermost first."""
        return self.wafers, self.height, self.width

    @property
    def device_mesh(self) -> Mesh | AbstractMesh:
        """The mesh, of a wafer that has one.

        Raises:
          ValueError: all PEs are virtual ones of one device.
        """
        if self.mesh is None:
            raise ValueError(f"{self!r} has no mesh: virtual PEs all live on one device")
        return self.mesh

    @property
    def reading(self) -> str:
        """`backend`, as it was called in 0.1."""
        return self.backend

    @property
    def platform(self) -> str | None:
        """What its programs run on: "cpu", "gpu" or "tpu"; None for one that never runs."""
        if self.backend == "abstract":
            return None
        if self.mesh is None:
            return jax.default_backend()
        return self.device_mesh.devices.flat[0].platform

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

        The meaning is `jax.shard_map`'s on every backend: an axis of the wafer that a spec does not
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
        specs = Specs.of(in_specs, out_specs)
        return program.mapped_program(
            self, kernel, specs, replicated_by_construction, donate_argnums
        )

    def mesh_spec(self, spec: P) -> P:
        """`spec` in the mesh's own names, without the axes that the mesh lacks."""

        def rename(entry):
            names = [self._mesh_name(a) for a in axes_of(entry)]
            names = [n for n in names if n is not None]
            return None if not names else names[0] if len(names) == 1 else tuple(names)

        return P(*(rename(entry) for entry in spec))

    def _mesh_name(self, axis: str) -> str | None:
        names = SPREAD if self.backend == "virtual" else dict(self.names)
        return names[axis] if axis in self.axes else None

    def devices_along(self, axis: str) -> int:
        """Over how many devices the PEs along `axis` are spread; 1 where they are on one."""
        if self.mesh is None or self.backend == "abstract":
            return 1
        return self.mesh.shape.get(self._mesh_name(axis), 1)

    def sharding(self, spec: P) -> Sharding:
        """Where an array laid out by `spec` lives; for `jax.device_put` and `out_shardings=`.

        Virtual PEs on one device keep every array whole there.
        """
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.device_mesh, self.mesh_spec(spec))

    def shard(self, array: jax.typing.ArrayLike, spec: P = TILED) -> jax.Array:
        """`array` laid out by `spec`, inside or outside jit.

        Raises:
          ValueError: a size does not divide by the PEs along it.
        """
        check_divides(self, "Wafer.shard", array, spec)
        if self.mesh is None:
            return jnp.asarray(array)
        if isinstance(array, jax.core.Tracer):
            return on_devices.constrain(self, array, spec)
        if self.backend == "abstract":
            raise program.never_runs(self, "Wafer.shard")
        return jax.device_put(array, self.sharding(spec))

    def tile(self, array: jax.Array, y: int, x: int, wafer: int = 0, spec: P = TILED) -> jax.Array:
        """The tile of `array` that PE (`y`, `x`) holds when it is laid out by `spec`.

        Raises:
          ValueError: there is no such PE, or a size does not divide by the PEs along it.
        """
        at = {ROWS: y, COLS: x, WAFERS: wafer}
        check_inside(self, "Wafer.tile", at)
        check_divides(self, "Wafer.tile", array, spec)
        if self.backend == "devices" and on_devices.explicit(self):
            array = on_devices.constrain(self, array, P())  # a split dimension could not be cut
        return tile_at(self, array, at, spec)

    def __repr__(self) -> str:
        of = f" of {self.machine.name}" if self.machine else ""
        on = (
            f" on {self.device_mesh.size} devices"
            if self.backend == "virtual" and self.mesh
            else ""
        )
        return f"<Wafer {self.backend} {_grid_text(self)}{of}{on}>"


def _same(axes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, axis) for axis in axes)


def _present(wafer: Wafer) -> Wafer:
    return dataclasses.replace(wafer, names=_same(AXES if wafer.wafers > 1 else (ROWS, COLS)))


def _grid_text(wafer: Wafer) -> str:
    grid = f"{wafer.height}x{wafer.width}"
    return grid if wafer.wafers == 1 else f"{wafer.wafers}x{grid}"
