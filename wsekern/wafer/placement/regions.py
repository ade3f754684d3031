"""This file is sub-rectangles of a wafer: which PEs they are, and the meshes of their devices."""

from __future__ import annotations

import numpy as np
from jax.sharding import AbstractMesh, Mesh


def check(height: int, width: int, y: int, x: int, of: tuple[int, int]) -> None:
    """Raises ValueError where a region is not inside a wafer of `of` PEs."""
    inside = y >= 0 and x >= 0 and height >= 1 and width >= 1
    if not inside or y + height > of[0] or x + width > of[1]:
        raise ValueError(
            f"Wafer.region: {height}x{width} PEs from ({y}, {x}) on are not inside {of[0]}x{of[1]}"
        )


def cuts(what: str, size: int, parts: int) -> list[tuple[int, int]]:
    """(start, length) of `parts` stretches of a line, as equal as can be, the longer ones first.

    Raises:
      ValueError: there are not so many PEs.
    """
    if not 1 <= parts <= size:
        raise ValueError(f"Wafer.split: {what}={parts} must be from 1 to the {size} PEs there")
    lengths = [size // parts + (i < size % parts) for i in range(parts)]
    starts = np.cumsum([0, *lengths[:-1]])
    return [(int(start), length) for start, length in zip(starts, lengths, strict=True)]


def mesh_of(
    mesh: Mesh | AbstractMesh | None, part: dict[str, tuple[int, int]]
) -> Mesh | AbstractMesh | None:
    """The mesh with, along each axis named in `part`, that (start, length) of its places alone."""
    if mesh is None:
        return None
    names, types = mesh.axis_names, mesh.axis_types
    whole = {name: (0, mesh.shape[name]) for name in names} | part
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(whole[n][1] for n in names), names, axis_types=types)
    kept = tuple(slice(whole[n][0], sum(whole[n])) for n in names)
    return Mesh(mesh.devices[kept], names, axis_types=types)
