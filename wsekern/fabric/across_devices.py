"""Moves between virtual PEs that are spread over devices in blocks: a local move, and the edges.

A `lax.ppermute` over devices inside `jax.vmap` would send whole blocks. So a move has a vmap rule
of its own, which sees a device's block at once and sends only the rows that another device needs.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, Shaped

from wsekern.fabric import jax_collectives

Pairs = tuple[tuple[int, int], ...]  # (source, destination) places along one axis
_MAX_STRETCHES = 8  # with more of them, a block is gathered place by place, not joined from slices
_FEW = 4  # PEs of an edge that are sent one by one where the whole block is not at hand
_NOBODY = -1  # the source of a PE that receives nothing


class Stretch(NamedTuple):
    """Neighbors in a block that receive from neighbors of one other block, on every device.

    A shift by one along 2 devices with blocks of 3 PEs has two: place 0 receives from place 2 of
    the device before, and places 1 and 2 from places 0 and 1 of their own device.
    """

    begin: int  # the first place that receives
    length: int
    source: int  # the first place that is sent
    distance: int  # devices from the receivers' back to the senders', around the ring of devices
    receives: Bool[np.ndarray, "devices length"]  # which PEs receive anything


class BlockMove(NamedTuple):
    """A move along one axis, as the devices perform it."""

    distance: Int[np.ndarray, "devices block"]  # devices from each PE's back to its sender's
    source: Int[np.ndarray, "devices block"]  # its sender's place in the block, or _NOBODY
    # None where the devices differ in what they send, or the stretches are too many.
    stretches: tuple[Stretch, ...] | None


def permute(
    tile: Shaped[Array, "..."], name: str, pairs: Pairs, fill: float
) -> Shaped[Array, "..."]:
    """`tile` sent along `name` by `pairs` of (source, destination).

    Each device sends every other device only the rows it needs; messages are padded to the largest
    request. A PE to which nothing is sent gets `fill`.
    """

    @custom_vmap
    def move(tile: Shaped[Array, "..."], place: Int[Array, ""]) -> Shaped[Array, "..."]:
        del place
        return tile

    # The place is an operand only to tell which vmap this is: it is batched by the vmap of `name`
    # alone. Until that one, the rule passes `move` on.
    @move.def_vmap
    def _(
        size: int, batched: Sequence[bool], tile: Shaped[Array, "..."], place: Int[Array, "..."]
    ) -> tuple[Shaped[Array, "..."], bool]:
        if not batched[1]:  # another axis: its tiles together are one larger tile to this move
            return move(tile, place), True
        block = tile if batched[0] else jnp.broadcast_to(tile, (size, *tile.shape))
        return _permute_block(block, name, pairs, fill), True

    return move(tile, lax.axis_index(name))


def _permute_block(
    block: Shaped[Array, "block ..."], name: str, pairs: Pairs, fill: float
) -> Shaped[Array, "block ..."]:
    spread = jax_collectives.spread_axis(name)
    assert spread is not None
    move = plan_move(lax.axis_size(spread), len(block), pairs)
    if move.stretches is None:
        return _gather_block(block, move, spread, fill)
    # A slice copies neighboring rows at once, where `_gather_block` looks up each row.
    parts = []
    for stretch in move.stretches:
        part = lax.slice_in_dim(block, stretch.source, stretch.source + stretch.length)
        if stretch.distance and stretch.receives.any():
            part = lax.ppermute(part, spread, _device_pairs(stretch.receives, stretch.distance))
        parts.append(_fill_idle(part, stretch.receives, spread, fill))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _gather_block(
    block: Shaped[Array, "block ..."], move: BlockMove, spread: str, fill: float
) -> Shaped[Array, "block ..."]:
    """The new block, place by place: for moves in no simple order, such as a folded ring's.

    The rows that arrive are put behind the block's own, and the new block is gathered from both:

        own rows   0 1 2 | from the device before   3 4 | from two before   5
    """
    devices, size = move.source.shape
    mine = lax.axis_index(spread)
    pool = [block]
    row_in_pool: np.ndarray = np.where(move.distance == 0, move.source, 0)
    for distance in range(1, devices):
        receives = (move.distance == distance) & (move.source != _NOBODY)
        most = int(receives.sum(1).max())
        if not most:
            continue
        # Which rows each device sends. All send as many as the largest request: one program runs
        # on every device. Row 0 pads.
        wanted = np.zeros((devices, most), np.int32)
        for device in range(devices):
            rows = move.source[device][receives[device]]
            wanted[(device - distance) % devices, : len(rows)] = rows
            row_in_pool[device][receives[device]] = sum(map(len, pool)) + np.arange(len(rows))
        rows_sent = jnp.take(block, jnp.asarray(wanted)[mine], axis=0, mode="clip")
        pool.append(lax.ppermute(rows_sent, spread, _device_pairs(receives, distance)))
    rows_here = jnp.concatenate(pool) if len(pool) > 1 else block
    row_in_pool = np.where(move.source == _NOBODY, 0, row_in_pool).astype(np.int32)
    # "clip": every row exists, and the default would make XLA fill rows that do not.
    new = jnp.take(rows_here, jnp.asarray(row_in_pool)[mine], axis=0, mode="clip")
    return _fill_idle(new, move.source != _NOBODY, spread, fill)


def _device_pairs(
    receives: Bool[np.ndarray, "devices pes"], distance: int
) -> list[tuple[int, int]]:
    """(source, destination) of the devices whose PEs receive from `distance` devices before."""
    devices = len(receives)
    return [((d - distance) % devices, d) for d in range(devices) if receives[d].any()]


def _fill_idle(
    rows: Shaped[Array, "pes ..."],
    receives: Bool[np.ndarray, "devices pes"],
    spread: str,
    fill: float,
) -> Shaped[Array, "pes ..."]:
    """`rows`, with `fill` for the PEs of this device that receive nothing."""
    if receives.all():
        return rows
    received = jnp.asarray(receives)[lax.axis_index(spread)].reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(received, rows, jnp.asarray(fill, rows.dtype))


@functools.lru_cache(maxsize=1024)
def plan_move(devices: int, block: int, pairs: Pairs) -> BlockMove:
    """How `devices` with blocks of `block` PEs perform the move of `pairs`.

    A shift by one with 2 devices of 3 PEs:

        PE        0 1 2 | 3 4 5
        source    5 0 1 | 2 3 4      in its block   2 0 1 | 2 0 1
        distance  1 0 0 | 1 0 0
    """
    sender: np.ndarray = np.full(devices * block, _NOBODY)
    for source, destination in pairs:
        sender[destination] = source
    sender = sender.reshape(devices, block)
    receives = sender != _NOBODY
    behind = (np.arange(devices)[:, None] - sender // block) % devices
    distance = np.where(receives, behind, 0)
    place = np.where(receives, sender % block, _NOBODY)
    return BlockMove(distance, place, _stretches(distance, place))


def _stretches(
    distance: Int[np.ndarray, "devices block"], source: Int[np.ndarray, "devices block"]
) -> tuple[Stretch, ...] | None:
    receives = source != _NOBODY
    # One program runs on every device, so a slice must be the same on all that receive there.
    common = distance.max(0, where=receives, initial=0), source.max(0)
    if (receives & ((distance != common[0]) | (source != common[1]))).any():
        return None
    # A place where no device receives continues the stretch before it, which then is one slice.
    distances, sources = common[0].copy(), common[1].copy()
    for i in np.flatnonzero(~receives.any(0)):
        distances[i], sources[i] = (distances[i - 1], sources[i - 1] + 1) if i else (0, 0)
        if sources[i] == len(sources):  # beyond the block: any row will do, it is masked
            distances[i], sources[i] = 0, 0
    starts = np.r_[True, (np.diff(sources) != 1) | (np.diff(distances) != 0)]
    begins = np.flatnonzero(starts)
    if len(begins) > _MAX_STRETCHES:
        return None
    ends = [*begins[1:], len(sources)]
    return tuple(
        Stretch(int(b), int(e - b), int(sources[b]), int(distances[b]), receives[:, b:e])
        for b, e in zip(begins, ends, strict=True)
    )


def permute_inside_vjp(
    tile: Shaped[Array, "..."], name: str, pairs: Pairs, fill: float
) -> Shaped[Array, "..."]:
    """As `permute`, for kernels that call `jax.vjp` themselves.

    `jax.vjp` runs before vmap there, and a `custom_vmap` has no derivative. So this one is made of
    JAX's collectives over both axes, which have one. A few PEs at an edge are sent one by one; a
    longer stretch takes the whole block.

    Raises:
      NotImplementedError: the move is not a shift.
    """
    spread = jax_collectives.spread_axis(name)
    assert spread is not None
    block = lax.axis_size(name)
    move = plan_move(lax.axis_size(spread), block, pairs)
    if move.stretches is None:
        raise NotImplementedError(
            f"fabric: a kernel differentiates a move along {name!r} that is no shift, on a wafer "
            "spread over devices; differentiate around Wafer.map"
        )
    place, new = lax.axis_index(name), tile
    for stretch in move.stretches:
        if stretch.distance and stretch.length <= _FEW:
            new = _send_edge(tile, new, stretch, name, spread)
            continue
        part = tile
        if stretch.distance:
            part = lax.ppermute(part, spread, _device_pairs(stretch.receives, stretch.distance))
        # Cyclic, since a permutation under vmap must be complete. What wraps around lies outside
        # the stretch, and is masked.
        by = stretch.begin - stretch.source
        part = lax.ppermute(part, name, [(i, (i + by) % block) for i in range(block)])
        in_stretch = (place >= stretch.begin) & (place < stretch.begin + stretch.length)
        new = jnp.where(in_stretch, part, new)
    receives = move.source != _NOBODY
    if receives.all():
        return new
    received = jnp.asarray(receives)[lax.axis_index(spread), place]
    return jnp.where(received, new, jnp.asarray(fill, tile.dtype))


def _send_edge(
    tile: Shaped[Array, "..."],
    new: Shaped[Array, "..."],
    stretch: Stretch,
    name: str,
    spread: str,
) -> Shaped[Array, "..."]:
    """`new` with the few tiles of a stretch that come from another device."""
    place, dtype = lax.axis_index(name), tile.dtype
    summable = tile.astype(jnp.int32) if dtype == jnp.bool_ else tile
    for i in range(stretch.length):
        # The sum of one tile and zeros is the same on the whole block: vmap does not batch it, so
        # that the device sends one tile.
        mine = place == stretch.source + i
        edge = lax.psum(jnp.where(mine, summable, jnp.zeros_like(summable)), name)
        edge = lax.ppermute(edge, spread, _device_pairs(stretch.receives, stretch.distance))
        new = jnp.where(place == stretch.begin + i, edge.astype(dtype), new)
    return new
