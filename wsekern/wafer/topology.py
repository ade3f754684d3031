"""Chips that are not there: their devices exist for the compiler only.

`Wafer.topology` makes wafers of them. The compilers come as packages: libtpu for TPUs, and JAX's
CUDA plugin for GPUs. Neither needs a chip. A TPU slice is a torus or a part of one; this module
knows which of its sides wrap around, and lays a grid out on it so that neighbors are near.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from wsekern.wafer.libtpu import keep_libtpu_quiet

_MOST_DEVICES = 9216  # of the largest slice that is sold, TPU7x


class _Kind(NamedTuple):
    """A kind of chip, as topologies name it."""

    chip: str
    sides: tuple[int, ...]  # how many sides a slice may have
    wraps_at: int | None  # a side of a multiple of this is a ring; None: none is
    cores: int = 1  # devices of a chip


# Google Cloud's documentation: v5e and v6e wrap around along a side of the whole pod, the others in
# cubes of four. TPU7x shows two devices a chip.
_TPUS = {
    "v4": _Kind("TPU v4", (3,), 4, cores=2),
    "v5e": _Kind("TPU v5e", (2,), 16),
    "v5p": _Kind("TPU v5p", (3,), 4),
    "v6e": _Kind("TPU v6e", (2,), 16),
    "tpu7x": _Kind("TPU7x", (3,), 4, cores=2),
}
_GPUS = {"h100": _Kind("H100 SXM", (1, 2, 3), None)}
_KINDS = _TPUS | _GPUS
_EXAMPLES = (
    "v5e:4x4 (16 chips) to v5e:16x16 (256), v6e:4x4 to v6e:16x16, v5p:2x2x1 (4) to v5p:4x4x4 (64) "
    "and more, tpu7x:4x4x4 (64, 128 devices), v4:4x4x4, and GPUs, h100:2x4 (8)"
)

# What XLA must know of a GPU, as the text of its GpuTargetConfigProto: NVIDIA's figures of an H100.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named slice of chips: "v5e:4x4" is a plane of 16, "v5p:4x4x4" a cube of 64."""

    kind: str
    sides: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """The topology called `name`.

        Raises:
          ValueError: the name is not KIND:SIDExSIDE, or the kind is unknown or has other sides.
        """
        match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
        if match is None or match[1] not in _KINDS:
            raise ValueError(f"topology {name!r} is not known; known are {_EXAMPLES}")
        kind, sides = _KINDS[match[1]], tuple(int(side) for side in match[2].split("x"))
        if len(sides) not in kind.sides or min(sides) < 1:
            dimensions = " or ".join(map(str, kind.sides))
            raise ValueError(
                f"topology {name!r}: {kind.chip} is given {dimensions} sides of 1 chip or more; "
                f"known are {_EXAMPLES}"
            )
        topology = cls(match[1], sides)
        if topology.size > _MOST_DEVICES:
            raise ValueError(
                f"topology {name!r} has {topology.size:,} devices, and no slice has more than "
                f"{_MOST_DEVICES:,}"
            )
        return topology

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def chip(self) -> str:
        """The name of its chips."""
        return _KINDS[self.kind].chip

    @property
    def platform(self) -> str:
        """ "tpu" or "gpu"."""
        return "tpu" if self.kind in _TPUS else "gpu"

    @property
    def size(self) -> int:
        """How many devices it has; on some TPUs a chip is two."""
        return math.prod(self.torus)

    @property
    def torus(self) -> tuple[int, ...]:
        """The sides that its devices are counted along, the two of one chip along the last."""
        cores = _KINDS[self.kind].cores
        return self.sides if cores == 1 else (*self.sides, cores)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the two ends of each side of the torus are neighbors."""
        at = _KINDS[self.kind].wraps_at
        rings = [at is not None and side % at == 0 for side in self.sides]
        return (*rings, *[False] * (len(self.torus) - len(self.sides)))

    @property
    def grid(self) -> tuple[int, int, int]:
        """(wafers, height, width) of a wafer that follows the torus: its own are the last sides."""
        sides = [side for side in self.sides if side > 1] or [1]
        *_, height, width = (1, 1, *sides)
        cores = _KINDS[self.kind].cores
        return self.size // (height * width * cores), height, width * cores

    def arrange(self, grid: tuple[int, int, int]) -> np.ndarray:
        """The places of a grid's devices on the torus, `[wafers, height, width, sides]`.

        Each axis of the grid runs over whole sides or factors of sides, there and back, so that
        neighbors are near: of all such ways the one with the fewest hops between neighbors.

        Raises:
          ValueError: the grid has not as many PEs as there are devices, or no such way leads to it.
        """
        if math.prod(grid) != self.size:
            raise ValueError(
                f"Wafer.topology: {_text(grid)} is {math.prod(grid)} PEs, and {self.name} has "
                f"{self.size} devices; grids that fit are {self._fitting()}"
            )
        if self.platform == "gpu":  # each is one hop from every other, by a switch
            return np.indices(grid).transpose(1, 2, 3, 0)
        ways = [self._places(way) for way in self._ways(grid)]
        if not ways:
            raise ValueError(
                f"Wafer.topology: {_text(grid)} does not follow the sides of {self.name}; grids "
                f"that fit are {self._fitting()}"
            )
        return min(ways, key=self._total_hops)

    def hops(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Links from places `a` to places `b`, whose last axis counts the sides of the torus."""
        if self.platform == "gpu":
            return np.any(a != b, -1).astype(int)
        apart = np.abs(a - b)
        sides = np.array(self.torus)
        around = np.where(self.wraps, np.minimum(apart, sides - apart), apart)
        # The two cores of a chip have no link between them: a word does not leave the chip.
        return around[..., : len(self.sides)].sum(-1)

    def _total_hops(self, places: np.ndarray) -> tuple[int, int]:
        steps = [self.hops(*_neighbors(places, axis)) for axis in range(3)]
        longest = max((int(step.max()) for step in steps if step.size), default=0)
        return longest, sum(int(step.sum()) for step in steps)

    def _ways(self, grid: tuple[int, int, int]) -> Iterator[tuple[tuple[_Factor, ...], ...]]:
        """The factors of sides that each axis of the grid runs over, outermost first."""
        for cut in itertools.product(*(_factors(d, side) for d, side in enumerate(self.torus))):
            factors = [factor for part in cut for factor in part]
            for order in itertools.permutations(factors):
                parts, rest = [], list(order)
                for size in grid:
                    taken: list[_Factor] = []
                    while rest and math.prod(f.size for f in taken) < size:
                        taken.append(rest.pop(0))
                    parts.append(tuple(taken))
                sizes = tuple(math.prod(f.size for f in part) for part in parts)
                if sizes == grid and not rest:
                    yield tuple(parts)

    def _places(self, way: tuple[tuple[_Factor, ...], ...]) -> np.ndarray:
        grid = tuple(math.prod(f.size for f in part) for part in way)
        places = np.zeros((*grid, len(self.torus)), int)
        for axis, part in enumerate(way):
            for factor, counts in zip(part, _there_and_back([f.size for f in part]), strict=True):
                along = counts.reshape([-1 if a == axis else 1 for a in range(3)])
                places[..., factor.side] += along * factor.step
        return places

    def _fitting(self) -> str:
        grids = [self.grid]
        wafers, height, width = self.grid
        if wafers > 1:
            grids += [(1, height, wafers * width), (1, wafers * height, width)]
        for side in (2, 4):
            if height % side == 0:
                grids.append((wafers, height // side, width * side))
        return ", ".join(_text(grid) for grid in dict.fromkeys(grids))


class _Factor(NamedTuple):
    """A part of a side of the torus: `size` places, `step` apart."""

    side: int
    size: int
    step: int


class AxisLinks(NamedTuple):
    """How far neighbors along one axis of a grid are from one another, in links of the machine."""

    furthest: int  # between two neighbors
    ends: int  # between the first and the last, where a ring closes

    def __str__(self) -> str:
        if not self.furthest:
            return "one device"
        neighbors = f"neighbors at most {self.furthest} hop{'s' * (self.furthest != 1)} apart"
        return f"{neighbors}, the two ends {self.ends}"


def find_devices(topology: Topology, grid: tuple[int, int, int]) -> np.ndarray:
    """The devices of a topology, which only a compiler can use, laid out as `grid`.

    Raises:
      ValueError: the grid does not fit.
      ImportError: the compiler's package is missing, or does not suit the jax at hand.
    """
    places = topology.arrange(grid)
    devices = _devices_of(topology)
    if topology.platform == "gpu":
        return np.array(devices, object).reshape(grid)
    by_place = {(*d.coords, d.core_on_chip): d for d in devices}
    padding = (0,) * (3 - len(topology.sides))

    def device_at(place: Sequence[int]) -> Any:
        sides = len(topology.sides)
        core = place[sides] if len(place) > sides else 0
        return by_place[(*place[:sides], *padding, core)]

    chosen = [device_at(tuple(map(int, place))) for place in places.reshape(-1, places.shape[-1])]
    return np.array(chosen, object).reshape(grid)


@contextlib.contextmanager
def kept_out_of_cache() -> Iterator[None]:
    """Compiles without writing to JAX's cache on disk.

    It would keep a program for chips that are not there, and could not read it again.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def is_compile_only(device: Any) -> bool:
    """Whether a device exists for a compiler only, so that no program runs on it."""
    return type(getattr(device, "client", None)).__name__ == "CompileOnlyPyClient"


@functools.cache
def _devices_of(topology: Topology) -> tuple[Any, ...]:
    return _tpus(topology) if topology.platform == "tpu" else _gpus(topology)


def _tpus(topology: Topology) -> tuple[Any, ...]:
    # Imported only where it is needed: `platforms` takes it as a sign that such chips are in use.
    from jax.experimental import topologies

    _check_libtpu()
    keep_libtpu_quiet()
    try:
        with _flags_that_libtpu_knows() as hidden:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name
            ).devices
            if hidden:  # it reads them when it compiles for the first time
                where = jax.sharding.SingleDeviceSharding(found[0])
                number = jax.ShapeDtypeStruct((), "float32", sharding=where)
                with kept_out_of_cache():
                    jax.jit(lambda x: x).lower(number).compile()
    except Exception as error:
        if "INVALID_ARGUMENT" in str(error):
            raise ValueError(
                f"topology {topology.name!r} is not one that libtpu knows ({error}); known "
                f"are {_EXAMPLES}"
            ) from None
        raise ImportError(
            f"libtpu {importlib.metadata.version('libtpu')} cannot make {topology.name} with jax "
            f"{jax.__version__} ({error}); pip install -U '{_libtpu_wanted()}'"
        ) from error
    return tuple(found)


@contextlib.contextmanager
def _flags_that_libtpu_knows() -> Iterator[bool]:
    """Hides XLA's flags for other platforms, on which libtpu would end the process.

    Gives whether there are any.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    others = ("--xla_cpu_", "--xla_gpu_")
    kept = [flag for flag in flags.split() if not flag.startswith(others)]
    if len(kept) == len(flags.split()):
        yield False
        return
    os.environ["XLA_FLAGS"] = " ".join(kept)
    try:
        yield True
    finally:
        os.environ["XLA_FLAGS"] = flags


def _check_libtpu() -> None:
    try:
        have = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "programs for TPUs are compiled by libtpu, which is not installed: pip install -e "
            "'.[tpu]' -c constraints.txt, or pip install libtpu; no TPU is needed"
        ) from None
    wanted = _libtpu_wanted()
    least = re.search(r"==([\d.]+)", wanted)
    if least and _numbers(have) < _numbers(least[1]):
        raise ImportError(
            f"libtpu {have} is too old for jax {jax.__version__}, which was made for {wanted}; pip "
            "install -U libtpu"
        )


def _libtpu_wanted() -> str:
    """What jax itself asks for: "libtpu==0.0.42.*"."""
    needs = importlib.metadata.requires("jax") or []
    return next((n.partition(";")[0].strip() for n in needs if n.startswith("libtpu")), "libtpu")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _gpus(topology: Topology) -> tuple[Any, ...]:
    for plugin in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            importlib.import_module(plugin)  # it registers the platform
        except ImportError:
            continue
        break
    else:
        raise ImportError(
            "programs for GPUs are compiled by JAX's CUDA plugin, which is not installed: pip "
            f"install 'jax[cuda12]=={jax.__version__}' (5.5 GB); no GPU is needed"
        )
    # One host has all of them; XLA asks for slices x hosts x devices.
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.name,
        topology=f"1x{topology.size}x1",
        target_config=_H100,
    ).devices
    return tuple(found)


def links_of(devices: np.ndarray) -> dict[int, AxisLinks] | None:
    """How far neighbors are along each axis of an array of TPUs; None where it is not known.

    Args:
      devices: real ones, or those of a topology.
    """
    first = devices.flat[0]
    if first.platform != "tpu":
        return None
    coords = np.array([[*d.coords, d.core_on_chip] for d in devices.flat])
    sides = coords.max(0) + 1
    name = first.device_kind.lower()
    kinds = {"tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5": "v5p", "tpu v6 lite": "v6e"}
    kind = kinds.get(name, "tpu7x" if "7x" in name else None)
    if kind is None:
        return None
    count = _KINDS[kind].sides[0]
    topology = Topology(kind, tuple(int(side) for side in sides[:count]))
    places = coords[:, :count]
    if _KINDS[kind].cores > 1:
        places = coords[:, [*range(count), 3]]
    places = places.reshape(*devices.shape, -1)
    found = {}
    for axis in range(devices.ndim):
        steps = topology.hops(*_neighbors(places, axis))
        ends = topology.hops(np.take(places, 0, axis), np.take(places, -1, axis))
        found[axis] = AxisLinks(int(steps.max(initial=0)), int(ends.max(initial=0)))
    return found


def _neighbors(places: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    length = places.shape[axis]
    return np.take(places, range(length - 1), axis), np.take(places, range(1, length), axis)


def _factors(side: int, size: int) -> Iterator[tuple[_Factor, ...]]:
    """The side whole, or cut into two factors; the second counts within one of the first."""
    if size == 1:
        yield ()
        return
    yield (_Factor(side, size, 1),)
    for inner in range(2, size // 2 + 1):
        if size % inner == 0:
            yield _Factor(side, size // inner, inner), _Factor(side, inner, 1)


def _there_and_back(sizes: Sequence[int]) -> list[np.ndarray]:
    """The counts of each size on a line over all of them: each step changes one of them by 1."""
    total = math.prod(sizes)
    counts, inner = [], total
    for size in sizes:
        inner //= size
        block = np.arange(total) // inner
        forward = block % size
        counts.append(np.where(block // size % 2 == 0, forward, size - 1 - forward))
    return counts


def _text(grid: tuple[int, int, int]) -> str:
    wafers, height, width = grid
    return f"{height}x{width}" if wafers == 1 else f"{wafers}x{height}x{width}"
