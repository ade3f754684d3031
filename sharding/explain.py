"""Where each array of a state lies, how many bytes it takes a device, and how much is padding."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from rich.table import Table

from sharding.rules import Home
from sharding.state import layout_of, logical_shape, named_leaves
from wsekern.wafer import layout
from wsekern.wafer.axes import axes_of
from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayPlacement:
    """Where one array of a state lies; one row of the table."""

    name: str  # its path in the state: "params/blocks/norm/scale"
    shape: tuple[int, ...]  # without padding
    dtype: str
    spec: P
    bytes_per_device: int  # padding included
    padding: float  # words of padding for each word of the array

    @property
    def size(self) -> int:
        """Words of the array, without padding."""
        return math.prod(self.shape)


def explain_state(state: Any, wafer: Wafer | None, home: Home = "wafer") -> list[ArrayPlacement]:
    """One placement for every array of `state`, laid out on `wafer`; `placement_table` draws them.

    Args:
      state: a state or its shapes (`jax.eval_shape`), padded or not.
      wafer: where the state lies; None for one device.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """
    placements = []
    for name, leaf in named_leaves(state).items():
        shape, spec = logical_shape(leaf), layout_of(leaf, home)
        padded = shape if wafer is None else layout.padded_shape(shape, spec, wafer)
        dtype = jnp.dtype(leaf.dtype)
        placements.append(
            ArrayPlacement(
                name=name,
                shape=shape,
                dtype=dtype.name,
                spec=spec,
                bytes_per_device=math.prod(padded) * dtype.itemsize // _shards(spec, wafer),
                padding=math.prod(padded) / max(1, math.prod(shape)) - 1,
            )
        )
    return placements


def placement_table(placements: list[ArrayPlacement]) -> Table:
    """A table of `placements` for a terminal (`rich.print`), with the sum of their bytes."""
    table = Table("array", "shape", "dtype", "layout", "bytes a device", "padding")
    for row in placements:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        spec = ", ".join("-" if entry is None else str(entry) for entry in row.spec) or "whole"
        padding = f"{row.padding:.1%}" if row.padding else ""
        table.add_row(row.name, shape, row.dtype, spec, f"{row.bytes_per_device:,}", padding)
    table.add_section()
    table.add_row("all", "", "", "", f"{sum(row.bytes_per_device for row in placements):,}", "")
    return table


# The names of release 0.1; to go after release 0.2.
Placement = ArrayPlacement
explain = explain_state
table = placement_table


def _shards(spec: P, wafer: Wafer | None) -> int:
    """How many devices an array is divided over."""
    if wafer is None:
        return 1
    if wafer.backend == "virtual":  # many PEs share a device
        return math.prod(wafer.devices_along(axis) for entry in spec for axis in axes_of(entry))
    return layout.parts(spec, wafer)
