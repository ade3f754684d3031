"""Wafers of chips that are not there: names, grids, hops, and what is refused."""

import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.wafer.topology import AxisLinks, Topology

KNOWN = r"v5e:4x4 \(16 chips\)"


def hops(topology: Topology, grid: tuple[int, int, int]) -> list[AxisLinks]:
    """Along each axis of the grid: the most links between neighbors, and between the two ends."""
    places = topology.arrange(grid)
    found = []
    for axis, size in enumerate(grid):
        steps = [
            topology.hops(np.take(places, i, axis), np.take(places, i + 1, axis)).max()
            for i in range(size - 1)
        ]
        ends = topology.hops(np.take(places, 0, axis), np.take(places, -1, axis)).max()
        found.append(AxisLinks(int(max(steps, default=0)), int(ends)))
    return found


@pytest.mark.parametrize(
    ("name", "platform", "size", "grid"),
    [
        ("v5e:4x4", "tpu", 16, (1, 4, 4)),
        (" V6E:16x16", "tpu", 256, (1, 16, 16)),
        ("v5p:4x4x4", "tpu", 64, (4, 4, 4)),
        ("v5p:2x2x1", "tpu", 4, (1, 2, 2)),
        ("v5p:4x1x1", "tpu", 4, (1, 1, 4)),
        ("tpu7x:2x2x2", "tpu", 16, (2, 2, 4)),  # a chip is two devices, which lie along x
        ("h100:2x4", "gpu", 8, (1, 2, 4)),
        ("h100:8", "gpu", 8, (1, 1, 8)),
        ("v5e:1x1", "tpu", 1, (1, 1, 1)),
    ],
)
def test_a_name_says_kind_and_sides(name, platform, size, grid):
    topology = Topology.parse(name)
    assert topology.name == name.strip().lower()
    assert (topology.platform, topology.size, topology.grid) == (platform, size, grid)
    places = topology.arrange(grid).reshape(size, -1)
    assert len({*map(tuple, places.tolist())}) == size  # each device once


@pytest.mark.parametrize("name", ["v5f:4x4", "v5e", "v5e:", "v5e:4x", "4x4", "v5e:4*4", "v5e:-4x4"])
def test_an_unknown_topology_is_told_those_that_are_known(name):
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))} is not known; .*{KNOWN}"):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x4x4", f"TPU v5e is given 2 sides of 1 chip or more; known are {KNOWN}"),
        ("v5p:4x4", "TPU v5p is given 3 sides"),
        ("h100:1x1x1x8", "H100 SXM is given 1 or 2 or 3 sides"),
        ("v6e:0x4", "TPU v6e is given 2 sides of 1 chip or more"),
        ("v5e:200x200", "has 40,000 devices, and no slice has more than 9,216"),
    ],
)
def test_wrong_sides_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("name", "grid", "links"),
    [
        ("v5e:4x4", (1, 4, 4), [(0, 0), (1, 3), (1, 3)]),  # no wraparound below 16 a side
        ("v5e:16x16", (1, 16, 16), [(0, 0), (1, 1), (1, 1)]),
        ("v6e:4x16", (1, 4, 16), [(0, 0), (1, 3), (1, 1)]),
        ("v5e:4x4", (1, 1, 16), [(0, 0), (0, 0), (1, 3)]),  # there and back
        ("v5p:4x4x4", (4, 4, 4), [(1, 1), (1, 1), (1, 1)]),
        ("v5p:4x4x4", (1, 4, 16), [(0, 0), (1, 1), (1, 1)]),
        ("v5p:4x4x4", (1, 8, 8), [(0, 0), (1, 1), (2, 2)]),
        ("v5p:2x2x2", (2, 2, 2), [(1, 1), (1, 1), (1, 1)]),
        ("tpu7x:2x2x4", (2, 2, 8), [(1, 1), (1, 1), (1, 1)]),
        ("h100:2x4", (1, 2, 4), [(0, 0), (1, 1), (1, 1)]),  # a switch joins them all
    ],
)
def test_grids_follow_the_torus(name, grid, links):
    assert hops(Topology.parse(name), grid) == [AxisLinks(*pair) for pair in links]


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("v5e:4x4", (1, 3, 5), "3x5 is 15 PEs, and v5e:4x4 has 16 devices; .* are 4x4, 2x8, 1x16"),
        ("v5p:4x4x4", (4, 4, 8), "4x4x8 is 128 PEs, and v5p:4x4x4 has 64 devices; .* are 4x4x4"),
        ("tpu7x:2x2x1", (1, 2, 2), "is 4 PEs, and tpu7x:2x2x1 has 8 devices"),
        ("v5e:8x1", (2, 2, 2), "2x2x2 does not follow the sides of v5e:8x1; .* fit are 1x8"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(name, grid, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(name).arrange(grid)


def test_links_read_as_a_sentence():
    assert str(AxisLinks(1, 3)) == "neighbors at most 1 hop apart, the two ends 3"
    assert str(AxisLinks(2, 2)) == "neighbors at most 2 hops apart, the two ends 2"
    assert str(AxisLinks(0, 0)) == "one device"


def test_without_libtpu_the_extra_is_named(monkeypatch):
    def no_version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_version)
    with pytest.raises(ImportError, match=r"libtpu, which is not installed: pip install -e '\.\[t"):
        wk.Wafer.topology("v5e:8x2")


def test_a_libtpu_older_than_jax_asks_for_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["libtpu==0.0.42.*; tpu"])
    with pytest.raises(ImportError, match=r"libtpu 0\.0\.9 is too old for jax .*libtpu==0\.0\.42"):
        wk.Wafer.topology("v5e:8x2")


def test_without_the_plugin_for_gpus_it_is_named(monkeypatch):
    def no_module(name):
        raise ImportError(name)

    monkeypatch.setattr("wsekern.wafer.topology.importlib.import_module", no_module)
    with pytest.raises(ImportError, match=r"JAX's CUDA plugin, .*pip install 'jax\[cuda12\]=="):
        wk.Wafer.topology("h100:3")


@pytest.mark.tpu
def test_a_wafer_has_the_grid_and_links_of_its_topology():
    wafer = wk.Wafer.topology("v5p:4x4x4", height=4)
    assert wafer.grid == (1, 4, 16) and wafer.platform == "tpu" and wafer.compile_only
    assert wafer.links == {"y": AxisLinks(1, 1), "x": AxisLinks(1, 1)}
    assert "to compile for" in repr(wafer) and "TPU v5" in repr(wafer)
    assert wk.Wafer.topology("v5p:4x4x4").grid == (4, 4, 4)
    assert not wk.Wafer.devices(2, 2).compile_only


@pytest.mark.tpu
def test_the_two_devices_of_a_chip_are_neighbors_along_x():
    wafer = wk.Wafer.topology("tpu7x:2x2x1")
    assert wafer.grid == (1, 2, 4)
    devices = wafer.device_mesh.devices
    for left, right in zip(devices[:, ::2].flat, devices[:, 1::2].flat, strict=True):
        assert left.coords == right.coords and left.core_on_chip != right.core_on_chip


@pytest.mark.tpu
def test_a_topology_that_libtpu_does_not_know_is_refused():
    with pytest.raises(ValueError, match=f"'v5e:17x3' is not one that libtpu knows .*{KNOWN}"):
        wk.Wafer.topology("v5e:17x3")


@pytest.mark.tpu
@pytest.mark.parametrize("target", ["v5e:4x4", "v5e:1x1"])
def test_nothing_runs_on_chips_that_are_not_there(target):
    wafer = wk.Wafer.topology(target)
    x = jnp.ones((8, 8))
    refuses = functools.partial(pytest.raises, ValueError)
    with refuses(match="Wafer.shard: the chips of .* are not there, .*compile"):
        wafer.shard(x)
    with refuses(match="Wafer.map: the chips of .* are not there, .*compile"):
        wafer.map(jnp.sin, in_specs=P("y"), out_specs=P("y"))(x)
    words = "outside of jax.jit: the chips of .* are not there, .*compile"
    with refuses(match=words):
        wk.matmul(x, x, wafer=wafer)
    with refuses(match=words), wafer:
        wk.rotary(x[None, None])


@pytest.mark.tpu
def test_programs_compile_on_it_as_on_any_wafer():
    wafer = wk.Wafer.topology("v5e:4x4")
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=wafer.sharding(P("y", "x")))
    with wafer:
        program = jax.jit(wk.matmul).lower(x, x).compile()
    memory = program.memory_analysis()
    assert memory is not None and memory.argument_size_in_bytes >= 2 * 64 * 64 * 2 // 16
