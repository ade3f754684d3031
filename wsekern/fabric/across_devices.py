"""This file is moves between PEs of which each device holds a block: a local move, and the edges.

A `lax.ppermute` over devices inside `jax.vmap` would send whole blocks. So a move has a rule of its
own under vmap, which sees the block of a device at once and sends only what another one needs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from wsekern.fabric import jax_collectives

Pairs = tuple[tuple[int, int], ...]
_STRETCHES = 8  # up to which a new block is put together from slices, not place by place
_FEW = 4  # tiles that are sent one by one, where a block is not at hand
_NOTHING = -1  # what a PE hears that hears nobody


class Stretch(NamedTuple):
    """Neighbors in a block who, on every device, hear neighbors of one other block alike."""

    begin: int  # the first that hears
    length: int
    of: int  # the first that is heard
    ahead: int  # how many devices before the hearers', round the ring of devices
    hear: np.ndarray  # [devices, length]: who of them hears anybody


class Plan(NamedTuple):
    """A move, as the devices do it."""

    device: np.ndarray  # [devices, block]: how many devices before a PE's is that of whom it hears
    place: np.ndarray  # [devices, block]: whose place in its block; _NOTHING where it hears nobody
    stretches: tuple[Stretch, ...] | None  # None where devices are not alike, or they are many


def permuted(tile: jax.Array, name: str, pairs: Pairs, fill: float) -> jax.Array:
    """`tile` sent along `name` as `pairs` of (source, destination) say; `fill` for who hears none.

    A device sends, to each other one, what that needs of its block, padded to what the one that
    needs most does.
    """

    @custom_vmap
    def moved(tile, place):
        del place
        return tile

    @moved.def_vmap
    def _(size, mapped, tile, place):
        if not mapped[1]:  # along another axis, whose tiles together are one larger tile to this
            return moved(tile, place), True
        block = tile if mapped[0] else jnp.broadcast_to(tile, (size, *tile.shape))
        return _moved(block, name, pairs, fill), True

    return moved(tile, lax.axis_index(name))


def _moved(block: jax.Array, name: str, pairs: Pairs, fill: float) -> jax.Array:
    spread = jax_collectives.spread_axis(name)
    assert spread is not None
    plan = plan_of(lax.axis_size(spread), len(block), pairs)
    if plan.stretches is None:
        return _place_by_place(block, plan, spread, fill)
    parts = []
    for begin, length, of, ahead, hear in plan.stretches:
        del begin
        part = lax.slice_in_dim(block, of, of + length)
        if ahead and hear.any():
            part = lax.ppermute(part, spread, _between(hear, ahead))
        parts.append(_filled(part, hear, spread, fill))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _place_by_place(block, plan, spread, fill):
    """The new block where PEs hear those of several blocks in no simple order."""
    devices, size = plan.place.shape
    mine = lax.axis_index(spread)
    heard = [block]
    at: np.ndarray = np.where(plan.device == 0, plan.place, 0)
    for ahead in range(1, devices):
        hears = (plan.device == ahead) & (plan.place != _NOTHING)
        most = int(hears.sum(1).max())
        if not most:
            continue
        wanted = np.zeros((devices, most), np.int32)  # of each device's block, by another
        for device in range(devices):
            own = plan.place[device][hears[device]]
            wanted[(device - ahead) % devices, : len(own)] = own
            at[device][hears[device]] = sum(map(len, heard)) + np.arange(len(own))
        sent = jnp.take(block, jnp.asarray(wanted)[mine], axis=0, mode="clip")
        heard.append(lax.ppermute(sent, spread, _between(hears, ahead)))
    pool = jnp.concatenate(heard) if len(heard) > 1 else block
    at = np.where(plan.place == _NOTHING, 0, at).astype(np.int32)
    new = jnp.take(pool, jnp.asarray(at)[mine], axis=0, mode="clip")
    return _filled(new, plan.place != _NOTHING, spread, fill)


def _between(hear: np.ndarray, ahead: int) -> list[tuple[int, int]]:
    """The pairs of devices of whom the second hears the one `ahead` before it."""
    devices = len(hear)
    return [((d - ahead) % devices, d) for d in range(devices) if hear[d].any()]


def _filled(part: jax.Array, hear: np.ndarray, spread: str, fill: float) -> jax.Array:
    if hear.all():
        return part
    here = jnp.asarray(hear)[lax.axis_index(spread)].reshape(-1, *[1] * (part.ndim - 1))
    return jnp.where(here, part, jnp.asarray(fill, part.dtype))


@functools.lru_cache(maxsize=1024)
def plan_of(devices: int, block: int, pairs: Pairs) -> Plan:
    """How `devices` that hold `block` PEs each make the move that `pairs` describe."""
    source: np.ndarray = np.full(devices * block, _NOTHING)
    for a, b in pairs:
        source[b] = a
    source = source.reshape(devices, block)
    hear = source != _NOTHING
    device = np.where(hear, (np.arange(devices)[:, None] - source // block) % devices, 0)
    place = np.where(hear, source % block, _NOTHING)
    return Plan(device, place, _stretches(device, place))


def _stretches(device: np.ndarray, place: np.ndarray) -> tuple[Stretch, ...] | None:
    hear = place != _NOTHING
    most = device.max(0, where=hear, initial=0), place.max(0)
    if (hear & ((device != most[0]) | (place != most[1]))).any():
        return None
    # A place where no device hears anybody continues what comes before it.
    ahead, of = most[0].copy(), most[1].copy()
    for i in np.flatnonzero(~hear.any(0)):
        ahead[i], of[i] = (ahead[i - 1], of[i - 1] + 1) if i else (0, 0)
        if of[i] == len(of):
            ahead[i], of[i] = 0, 0
    new = np.r_[True, (np.diff(of) != 1) | (np.diff(ahead) != 0)]
    begins = np.flatnonzero(new)
    if len(begins) > _STRETCHES:
        return None
    ends = [*begins[1:], len(of)]
    return tuple(
        Stretch(int(b), int(e - b), int(of[b]), int(ahead[b]), hear[:, b:e])
        for b, e in zip(begins, ends, strict=True)
    )


def permuted_by_tiles(tile: jax.Array, name: str, pairs: Pairs, fill: float) -> jax.Array:
    """As `permuted`, differentiable before vmap: where a kernel calls `jax.vjp` itself.

    Raises:
      NotImplementedError: the move is no shift.
    """
    spread = jax_collectives.spread_axis(name)
    assert spread is not None
    block = lax.axis_size(name)
    plan = plan_of(lax.axis_size(spread), block, pairs)
    if plan.stretches is None:
        raise NotImplementedError(
            f"fabric: a kernel differentiates a move along {name!r} that is no shift, on a wafer "
            "spread over devices; differentiate around Wafer.map"
        )
    place, new = lax.axis_index(name), tile
    for stretch in plan.stretches:
        if stretch.ahead and stretch.length <= _FEW:
            new = _by_rows(tile, new, stretch, name, spread)
            continue
        part = tile
        if stretch.ahead:
            part = lax.ppermute(part, spread, _between(stretch.hear, stretch.ahead))
        by = stretch.begin - stretch.of
        part = lax.ppermute(part, name, [(i, (i + by) % block) for i in range(block)])
        here = (place >= stretch.begin) & (place < stretch.begin + stretch.length)
        new = jnp.where(here, part, new)
    hears = plan.place != _NOTHING
    if hears.all():
        return new
    here = jnp.asarray(hears)[lax.axis_index(spread), place]
    return jnp.where(here, new, jnp.asarray(fill, tile.dtype))


def _by_rows(tile, new, stretch, name, spread):
    """`new` with what a few PEs hear from another device."""
    place, kind = lax.axis_index(name), tile.dtype
    counted = tile.astype(jnp.int32) if kind == jnp.bool_ else tile
    for i in range(stretch.length):
        # A sum of one tile and of zeros is the same for the whole block, so that it is sent once.
        edge = lax.psum(jnp.where(place == stretch.of + i, counted, jnp.zeros_like(counted)), name)
        edge = lax.ppermute(edge, spread, _between(stretch.hear, stretch.ahead))
        new = jnp.where(place == stretch.begin + i, edge.astype(kind), new)
    return new
