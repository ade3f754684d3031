"""What a compiled program sends: each collective's bytes, its axes, and how long its links need.

Bytes are those that a chip receives: for an all-gather all others' tiles, for a move to a neighbor
one tile, and so on (`_RECEIVED`). Links carry them at the rate of one link in one direction, or of
both directions where an axis closes to a ring and all chips take part. How far a move goes is not
counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from wsekern.compiler.hlo import Computation, Instruction, Program
from wsekern.compiler.mesh_axes import MeshAxes, groups_of, pairs_of

# What a chip receives in a group of n, for each byte that it hands in.
_RECEIVED: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
KINDS = tuple(_RECEIVED)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of one collective."""

    kind: str  # "all-gather", ...
    axes: tuple[str, ...]  # of the mesh
    direction: int  # of a permutation along its axis: 1 or -1; 0: both
    bytes: float  # that a chip receives
    seconds: float  # that its links need

    @property
    def links(self) -> tuple[tuple[str, int], ...]:
        """The links that it takes, as (axis, direction)."""
        directions = (self.direction,) if self.direction else (1, -1)
        return tuple((axis, way) for axis in self.axes or ("",) for way in directions)


def transfer_of(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    mesh: MeshAxes,
    link_bytes_per_second: float,
) -> Transfer | None:
    """The transfer that an instruction makes or begins; None if it moves nothing between chips.

    An instruction begins one as `all-gather-start`, as `async-start` around a computation with a
    collective, at whatever depth, or as a fusion that ends with the custom call
    "AsyncCollectiveStart".
    """
    kind = kind_of(instruction)
    if kind == "all-reduce" and _keeps_a_part(computation, instruction):
        kind = "reduce-scatter"
    if kind is None:
        for _, inner in program.called(instruction):
            for one in inner.instructions:
                if kind_of(one) is not None or one.called:
                    found = transfer_of(program, inner, one, mesh, link_bytes_per_second)
                    if found is not None:
                        return found
        return None
    operands = [computation.by_name.get(name) for name in instruction.operands]
    handed_in = sum(one.bytes for one in operands if one is not None)
    if kind == "collective-permute":
        pairs = pairs_of(instruction)
        axes = _axes_of_pairs(mesh, pairs)
        size, direction = (2 if pairs else 1), mesh.direction(pairs) if len(axes) == 1 else 0
        received = handed_in if pairs else 0.0
    else:
        groups = groups_of(instruction)
        largest = max(groups, key=len, default=tuple(range(_all(mesh))))
        axes, size, direction = mesh.of_group(largest), len(largest), 0
        received = handed_in * _RECEIVED[kind](size) if size > 1 else 0.0
    rate = link_bytes_per_second
    if kind != "collective-permute":
        rate *= max(1, len(axes)) * (2 if mesh.is_ring(axes) else 1)
    return Transfer(kind, axes, direction, received, received / rate)


def kind_of(instruction: Instruction) -> str | None:
    """The kind of collective that an instruction is or begins; None for any other."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in _RECEIVED else None


def _keeps_a_part(computation: Computation, instruction: Instruction) -> bool:
    """Whether a computation returns only a chip's own part of an all-reduce.

    TPUs have no other way to say it: such a fusion is called "all-reduce-scatter", and sends what a
    reduce-scatter sends.
    """
    root = computation.root
    cuts = root is not None and root.opcode == "dynamic-slice"
    return cuts and root is not None and root.operands[:1] == (instruction.name,)


def _axes_of_pairs(mesh: MeshAxes, pairs: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    found = {axis for pair in pairs for axis in mesh.of_group(pair)}
    return tuple(name for name in mesh.names if name in found)


def _all(mesh: MeshAxes) -> int:
    size = 1
    for count in mesh.sizes:
        size *= count
    return size
