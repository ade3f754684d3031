"""This file is a table of a state: what lies where, in how many bytes, with how much padding."""

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
class Placement:
    """Where one array of a state lies."""

    name: str
    shape: tuple[int, ...]  # without padding
    dtype: str
    spec: P
    bytes_per_device: int  # padding included
    padding: float  # words of padding for each word of the array

    @property
    def size(self) -> int:
        """Words of the array, without padding."""
        return math.prod(self.shape)


def explain(state: Any, wafer: Wafer | None, home: Home = "wafer") -> list[Placement]:
    """One row for every array of `state`, laid out on `wafer`.

    Args:
      state: a state or its shapes, padded or not.
      wafer: where it lies; None for one device.
      home: "wafer", or "memoryx" for where streamed weights live.
    """
    rows = []
    for name, leaf in named_leaves(state).items():
        shape, spec = logical_shape(leaf), layout_of(leaf, home)
        held = shape if wafer is None else layout.padded_shape(shape, spec, wafer)
        parts = 1
        if wafer is not None and wafer.backend == "virtual":
            parts = math.prod(wafer.devices_along(a) for e in spec for a in axes_of(e))
        elif wafer is not None:
            parts = layout.parts(spec, wafer)
        dtype = jnp.dtype(leaf.dtype)
        rows.append(
            Placement(
                name=name,
                shape=shape,
                dtype=dtype.name,
                spec=spec,
                bytes_per_device=math.prod(held) * dtype.itemsize // parts,
                padding=math.prod(held) / max(1, math.prod(shape)) - 1,
            )
        )
    return rows


def table(rows: list[Placement]) -> Table:
    """`rows` for a terminal, with their sum."""
    drawn = Table("array", "shape", "dtype", "layout", "bytes a device", "padding")
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        spec = ", ".join("-" if entry is None else str(entry) for entry in row.spec) or "whole"
        padding = f"{row.padding:.1%}" if row.padding else ""
        drawn.add_row(row.name, shape, row.dtype, spec, f"{row.bytes_per_device:,}", padding)
    drawn.add_section()
    drawn.add_row("all", "", "", "", f"{sum(row.bytes_per_device for row in rows):,}", "")
    return drawn
