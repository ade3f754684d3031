"""`Wafer`: a grid of PEs, and the backend that runs kernels on it.

A kernel runs on one of three backends: on real devices (`jax.shard_map` over a mesh), on virtual
PEs (nested `jax.vmap` on one device), or abstractly (a trace over an `AbstractMesh`, never run).
`Wafer.map` is the door to all three.
"""

import dataclasses
import html
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from wsekern.hardware import Machine
from wsekern.wafer import context, cpu_threads, on_devices, program, regions, virtual
from wsekern.wafer.absent import never_runs
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.placement import failed_devices
from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.place import Placement, check_fits, place_on
from wsekern.wafer.specs import Specs, check_divides, check_inside, tile_at
from wsekern.wafer.topology import AxisLinks, Topology, find_devices, is_compile_only, links_of

TILED = P(ROWS, COLS)
_MOST_WAFERS = 2048  # of a cluster of CS-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wafer:
    """A grid of PEs and the backend of the programs on it; immutable, equal by value.

    Make one with `Wafer.devices` (real or emulated devices), `Wafer.of` (a mesh that you have),
    `Wafer.virtual` (many PEs on few devices), `Wafer.abstract` (to estimate, never to run) or
    `Wafer.topology` (chips that are not there, to compile for).
    Inside `with wafer:` it is the wafer of every operation that is given none.
    """

    backend: Literal["devices", "virtual", "abstract"]
    height: int  # PEs north to south
    width: int  # PEs west to east
    wafers: int = 1
    mesh: Mesh | AbstractMesh | None = None  # None for virtual PEs on one device
    machine: Machine | None = None  # None for plain devices
    # (axis of the wafer, the mesh's name for it); an axis that the mesh lacks has size 1.
    names: tuple[tuple[str, str], ...] = ((ROWS, ROWS), (COLS, COLS))
    placement: Placement | None = None  # the physical PEs; None: side by side
    corner: tuple[int, int] = (0, 0)  # the row and column of the whole wafer where a region begins

    def __post_init__(self) -> None:
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
        """A wafer of real or CPU-emulated devices, one PE each.

        Neighbors in the grid are near one another in the machine.

        Args:
          height: rows of the grid.
          width: columns of the grid.
          wafers: how many grids of this size work together.
          devices: which devices, in order; by default the first of `jax.devices()`, in the order
            that suits their physical topology.
          failed: ids of devices to leave out.

        Raises:
          ValueError: the grid is not positive; it needs more devices than there are (with `failed`,
            the message gives the largest grid that is left); or `failed` has an unknown id.
        """
        wafer = cls(backend="devices", height=height, width=width, wafers=wafers)
        available = list(jax.devices() if devices is None else devices)
        rectangle = None
        if failed:
            available = failed_devices.working_devices(available, failed)
            failed_devices.check_enough(height, width, wafers, len(available), len(set(failed)))
            rectangle = failed_devices.rectangle(available, height * wafers, width)
        if wafer.size > len(available):
            raise ValueError(
                f"Wafer.devices: {_grid_text(wafer)} needs {wafer.size} devices, there are "
                f"{len(available)}; ask for a smaller grid, or on a CPU call "
                f"wsekern.emulate_devices({wafer.size}) before jax starts"
            )
        axes = wafer.axes if wafers == 1 else AXES
        sizes = tuple(wafer.axis_size(axis) for axis in axes)
        chosen = available[: wafer.size]
        if rectangle is None and devices is None and not failed:
            ordered = mesh_utils.create_device_mesh(sizes, chosen)
        else:
            ordered = np.array(chosen if rectangle is None else rectangle, object).reshape(sizes)
        mesh = Mesh(ordered, axes, axis_types=(AxisType.Auto,) * len(axes))
        cpu_threads.check_threads(mesh)
        return dataclasses.replace(wafer, mesh=mesh, names=_same_names(axes))

    @classmethod
    def of(cls, mesh: Mesh, y: str, x: str, wafer: str | None = None) -> "Wafer":
        """The mesh you already have, with Auto or Explicit axes, as a wafer.

        Operations then run on its arrays inside your own jit. Along mesh axes not named here, every
        PE does the same work: an operand that is split along one is gathered first on Explicit
        axes, and as XLA's partitioner sees fit on Auto ones. So give your axis of data parallelism
        as `wafer`.

        Args:
          mesh: your mesh.
          y: the name of its axis that counts rows.
          x: the name of its axis that counts columns.
          wafer: the name of its axis that counts wafers, if it has one.

        Raises:
          ValueError: a name is not an axis of the mesh or is used twice, or some of the axes named
            are Explicit and others Auto.
        """
        mesh_names = {ROWS: y, COLS: x} | ({WAFERS: wafer} if wafer is not None else {})
        on_devices.check_mesh(mesh, mesh_names)
        cpu_threads.check_threads(mesh)
        return cls(
            backend="devices",
            height=mesh.shape[y],
            width=mesh.shape[x],
            wafers=1 if wafer is None else mesh.shape[wafer],
            mesh=mesh,
            names=tuple((axis, mesh_names[axis]) for axis in AXES if axis in mesh_names),
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
        """Every PE of a wafer-scale machine simulated, with a tile of its own.

        The PEs are on one device, or in blocks on several. Results are exactly those of `height *
        width * wafers` PEs; the time is that of the devices.

        Args:
          machine: the wafer-scale machine, such as `wk.WSE2`.
          height: rows of PEs.
          width: columns of PEs.
          wafers: how many wafers of this grid work together.
          devices: the grid of devices, `(2, 4)`, or with the wafers first, `(2, 2, 4)`. Each has a
            block of neighboring PEs, and sends others the edges of its block. Or a wafer made by
            `Wafer.devices`, to choose the devices.
          defects: the faulty PEs of the physical wafer; all wafers have the same. The program is
            placed around them. That changes no result, only what `wsekern.estimate` says.
          folded: whether both axes are folded on the wafer. Neighbors in a ring, its two ends too,
            are then two hops apart, and so are neighbors on a line.

        Raises:
          ValueError: the grid is not positive; it does not fit the machine's usable rectangle, or
            what the defects leave of it (the message gives the largest grid that fits); or it does
            not divide by the devices.
        """
        check_fits("Wafer.virtual", machine, height, width)
        wafer = cls(backend="virtual", height=height, width=width, wafers=wafers, machine=machine)
        wafer = _with_own_axes(wafer)
        placement = place_on(machine, height, width, defects, folded)
        if devices is not None:
            if isinstance(devices, Wafer):
                over = devices
            else:
                count, rows, columns = virtual.device_grid(devices)
                over = cls.devices(rows, columns, count)
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
        """A wafer over which programs are traced but never run; no device is needed.

        Args:
          machine: the wafer-scale machine, such as `wk.WSE3`.
          height: rows of PEs; by default all that a program can use.
          width: columns of PEs; by default all that a program can use.
          wafers: how many wafers of this grid work together.
          defects: the faulty PEs of the physical wafer; the program is placed around them.
          folded: whether both axes are folded on the wafer, so that the two ends of a ring are two
            hops apart, as all its neighbors.

        Raises:
          ValueError: the grid is not positive; or it does not fit the machine's usable rectangle,
            or what the defects leave of it (the message gives the largest grid that fits); there
            are more than 2,048 wafers.
        """
        height = machine.usable_height if height is None else height
        width = machine.usable_width if width is None else width
        check_fits("Wafer.abstract", machine, height, width)
        if wafers > _MOST_WAFERS:
            raise ValueError(f"Wafer.abstract: wafers={wafers} must be from 1 to {_MOST_WAFERS:,}")
        wafer = _with_own_axes(
            cls(backend="abstract", height=height, width=width, wafers=wafers, machine=machine)
        )
        sizes = tuple(wafer.axis_size(axis) for axis in wafer.axes)
        mesh = AbstractMesh(sizes, wafer.axes, axis_types=(AxisType.Auto,) * len(sizes))
        placement = place_on(machine, height, width, defects, folded)
        return dataclasses.replace(wafer, mesh=mesh, placement=placement)

    @classmethod
    def topology(
        cls,
        name: str,
        height: int | None = None,
        width: int | None = None,
        wafers: int | None = None,
    ) -> "Wafer":
        """A wafer of chips that are not there: programs are compiled for it, and never run.

        The chips' own compiler runs to the end, on any machine: see `wsekern.compile`. Rows and
        columns follow the sides of the slice, a third side makes wafers, and on chips that show two
        devices (v4, TPU7x) the two are neighbors along x. `links` says how far neighbors are.

        Args:
          name: the kind of chip and the sides of the slice: "v5e:4x4", "v6e:16x16", "v5p:4x4x4",
            "tpu7x:4x4x4", "v4:4x4x4", or GPUs that one switch joins, "h100:2x4".
          height: rows of the grid; by default the last side but one.
          width: columns; by default the last side.
          wafers: how many grids work together; by default 1 where height and width are given.
            Another grid of as many devices runs along the sides there and back: "v5p:4x4x4" with
            height 4 and width 16 has neighbors one hop apart.

        Raises:
          ValueError: the topology is unknown, or the grid does not fit it.
          ImportError: the compiler is missing (the extra `tpu`; for GPUs `jax[cuda12]`), or too old
            for the jax at hand.
        """
        slice_ = Topology.parse(name)
        grid = slice_.grid
        if (height, width, wafers) != (None, None, None):
            # What is left out follows from the number of devices.
            count = 1 if wafers is None else wafers
            height = height or slice_.size // ((width or grid[2]) * count)
            width = width or slice_.size // (height * count) if height else width
            grid = count, height or 1, width or 1
        wafers, height, width = grid
        devices = find_devices(slice_, grid)
        axes = AXES if wafers > 1 else (ROWS, COLS)
        shape = grid if wafers > 1 else grid[1:]
        mesh = Mesh(devices.reshape(shape), axes, axis_types=(AxisType.Auto,) * len(axes))
        wafer = cls(backend="devices", height=height, width=width, wafers=wafers, mesh=mesh)
        return dataclasses.replace(wafer, names=_same_names(axes))

    def region(self, y: int, x: int, height: int, width: int) -> "Wafer":
        """The PEs of a sub-rectangle as a wafer, for one of several programs at a time.

        Programs on regions that share no PE do not wait for one another: on devices they run side
        by side. A region keeps its PEs' places on the physical wafer.

        Args:
          y: the row of this wafer where the region begins.
          x: the column where it begins.
          height: its rows.
          width: its columns.

        Raises:
          ValueError: the region is not inside this wafer; or virtual PEs are spread over devices,
            and it does not consist of whole blocks.
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
        """This wafer cut into `rows * columns` regions, in row-major order.

        Their heights differ by one PE at most, and so do their widths.

        Raises:
          ValueError: an axis has fewer PEs than it should have parts.
        """
        down = regions.split_evenly("rows", self.height, rows)
        across = regions.split_evenly("columns", self.width, columns)
        return tuple(self.region(y, x, h, w) for y, h in down for x, w in across)

    @property
    def size(self) -> int:
        """How many PEs there are on all wafers together."""
        return self.height * self.width * self.wafers

    @property
    def grid(self) -> tuple[int, int, int]:
        """(wafers, height, width), outermost first."""
        return self.wafers, self.height, self.width

    @property
    def device_mesh(self) -> Mesh | AbstractMesh:
        """The mesh that programs run on, or are traced over.

        Raises:
          ValueError: the wafer has none, since all PEs are virtual and on one device.
        """
        if self.mesh is None:
            raise ValueError(f"{self!r} has no mesh: virtual PEs all live on one device")
        return self.mesh

    @property
    def reading(self) -> str:
        """The name of `backend` in 0.1."""
        return self.backend

    @property
    def platform(self) -> str | None:
        """Where its programs run: "cpu", "gpu" or "tpu"; None for an abstract wafer."""
        return None if self.backend == "abstract" else self._device.platform

    @property
    def device_kind(self) -> str | None:
        """What its devices are, as JAX calls them, such as "cpu"; None for an abstract wafer."""
        return None if self.backend == "abstract" else self._device.device_kind

    @property
    def _device(self) -> Any:
        """One of its devices, or what stands for them in the mesh of a traced array's type."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flat[0]
        return getattr(self.mesh, "abstract_device", None) or jax.devices()[0]

    @property
    def compile_only(self) -> bool:
        """Whether its chips are not there, so that programs are compiled for it and never run."""
        return isinstance(self.mesh, Mesh) and is_compile_only(self._device)

    @property
    def links(self) -> dict[str, AxisLinks] | None:
        """How far neighbors along each axis are in the machine, and the two ends of the axis.

        Counted in links between TPUs; None for other devices.
        """
        if not isinstance(self.mesh, Mesh) or self.backend != "devices":
            return None
        found = links_of(self.mesh.devices)
        if found is None:
            return None
        names = self.mesh.axis_names
        return {axis: found[names.index(name)] for axis, name in self.names if name in names}

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that this wafer has, outermost first: "y" and "x", or "wafer", "y" and "x"."""
        return tuple(axis for axis, _ in self.names)

    def axis_size(self, axis: str) -> int:
        """How many PEs stand along `axis`: `"y"`, `"x"` or `"wafer"`."""
        return {ROWS: self.height, COLS: self.width, WAFERS: self.wafers}[axis]

    def axis_name(self, axis: str) -> str | None:
        """The mesh's name for `axis`; None if it has no such axis."""
        return dict(self.names).get(axis)

    def __enter__(self) -> "Wafer":
        context.enter(self)
        return self

    def __exit__(self, *exception: object) -> None:
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

        The meaning is that of `jax.shard_map`, on every backend. If a spec does not name an axis of
        the wafer, every PE along it gets the whole operand, or must return the same result.

        The program is jitted, and kept for the next call with an equal kernel. Partials and
        lambdas are equal if their functions are, and all that they hold.

        Args:
          kernel: computes with `jnp`, and communicates through `wsekern.fabric` only. Differentiate
            around `map`, never inside the kernel. What a lambda holds is read when `map` is called.
            A lambda that holds an array is compiled at each call: pass arrays as operands.
          in_specs: a `PartitionSpec` in the names `"y"`, `"x"` and `"wafer"` for every operand, or
            a tuple of them (pytree prefixes, as in shard_map).
          out_specs: the same for the results.
          replicated_by_construction: True if a result is the same on every PE but JAX cannot infer
            it (one passed around a ring, say), or the kernel calls Pallas, which JAX cannot infer
            through. It turns JAX's check off for this map: compare all PEs' copies in a test, and
            test the gradient. Virtual PEs are never compared; the first one's result is taken.
          donate_argnums: operands whose memory the results may reuse, as in `jax.jit`.

        Raises:
          ValueError: a spec is not a PartitionSpec, names an unknown axis, or names one twice. The
            returned function raises it if an operand's size does not divide by the PEs along it, or
            the operand lies on other devices.
        """
        specs = Specs.of(in_specs, out_specs)
        return program.mapped_program(
            self, kernel, specs, replicated_by_construction, donate_argnums
        )

    def mesh_spec(self, spec: P) -> P:
        """`spec` in the mesh's names, without the axes that the mesh lacks."""

        def rename(entry: Any) -> None | str | tuple[str, ...]:
            mesh_names = map(self._mesh_name, axes_of(entry))
            names = [name for name in mesh_names if name is not None]
            return None if not names else names[0] if len(names) == 1 else tuple(names)

        return P(*(rename(entry) for entry in spec))

    def _mesh_name(self, axis: str) -> str | None:
        names = SPREAD if self.backend == "virtual" else dict(self.names)
        return names[axis] if axis in self.axes else None

    def devices_along(self, axis: str) -> int:
        """Over how many devices the PEs along `axis` are spread; 1 if they are on one."""
        if self.mesh is None or self.backend == "abstract":
            return 1
        return self.mesh.shape.get(self._mesh_name(axis), 1)

    def sharding(self, spec: P) -> Sharding:
        """The sharding of an array laid out by `spec`, for `jax.device_put` and `out_shardings=`.

        With virtual PEs on one device, every array is whole on that device.
        """
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.device_mesh, self.mesh_spec(spec))

    def shard(self, array: jax.typing.ArrayLike, spec: P = TILED) -> jax.Array:
        """`array` laid out by `spec`, inside or outside jit.

        Args:
          array: the whole array.
          spec: the axes of the wafer that each dimension is split over; by default rows over y and
            columns over x.

        Raises:
          ValueError: a size does not divide by the PEs along it.
        """
        check_divides(self, "Wafer.shard", array, spec)
        if self.mesh is None:
            return jnp.asarray(array)
        if isinstance(array, jax.core.Tracer):
            return on_devices.constrain(self, array, spec)
        if self.backend == "abstract" or self.compile_only:
            raise never_runs(self, "Wafer.shard")
        return jax.device_put(array, self.sharding(spec))

    def tile(self, array: jax.Array, y: int, x: int, wafer: int = 0, spec: P = TILED) -> jax.Array:
        """The tile of `array` that one PE holds if the array is laid out by `spec`.

        Args:
          array: the whole array.
          y: the PE's row.
          x: its column.
          wafer: its wafer.
          spec: the axes of the wafer that each dimension is split over.

        Raises:
          ValueError: there is no such PE, or a size does not divide by the PEs along it.
        """
        at = {ROWS: y, COLS: x, WAFERS: wafer}
        check_inside(self, "Wafer.tile", at)
        check_divides(self, "Wafer.tile", array, spec)
        if self.backend == "devices" and on_devices.explicit(self):
            # An Explicit dimension that is split cannot be sliced: gather the array first.
            array = on_devices.constrain(self, array, P())
        return tile_at(self, array, at, spec)

    def __repr__(self) -> str:
        of = f" of {self.machine.name}" if self.machine else ""
        on = (
            f" on {self.device_mesh.size} devices"
            if self.backend == "virtual" and self.mesh
            else ""
        )
        if self.compile_only:
            of = f" of {self.device_kind}, to compile for"
        return f"<Wafer {self.backend} {_grid_text(self)}{of}{on}>"

    def _repr_html_(self) -> str:
        """A table for notebooks: backend, grid, machine, devices."""
        rows = {"backend": self.backend, "grid": f"{_grid_text(self)}, {self.size:,} PEs"}
        if self.machine:
            rows["machine"] = self.machine.name
        if self.backend != "abstract":
            count = 1 if self.mesh is None else self.device_mesh.size
            rows["devices"] = f"{count} x {self.device_kind}"
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


def _same_names(axes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, axis) for axis in axes)


def _with_own_axes(wafer: Wafer) -> Wafer:
    """`wafer` with the axes that it has, by their own names: "wafer" only if it has several."""
    return dataclasses.replace(wafer, names=_same_names(AXES if wafer.wafers > 1 else (ROWS, COLS)))


def _grid_text(wafer: Wafer) -> str:
    grid = f"{wafer.height}x{wafer.width}"
    return grid if wafer.wafers == 1 else f"{wafer.wafers}x{grid}"
