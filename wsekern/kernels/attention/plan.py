"""This file is how attention is to be computed on a grid: the algorithm, its sizes, and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from wsekern.kernels.attention import vendor
from wsekern.kernels.attention.mask import Rule
from wsekern.kernels.attention.operands import Floats, Segments, shared_axes
from wsekern.wafer.axes import COLS, WAFERS
from wsekern.wafer.limits import fits_gathered
from wsekern.wafer.wafer import Wafer

Algorithm = Literal["auto", "ring", "allgather", "ulysses"]

_BLOCK = 512  # rows of a block inside a PE
_NARROW = 128  # below which a product runs at a worse rate
_BAND = _BLOCK * _BLOCK // _NARROW  # keys at once of so few rows: as many scores as in a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What is asked for."""

    causal: bool = False
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    algorithm: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What is done, on PEs that are all alike."""

    order: str  # "local", "allgather", "ulysses", "ring", or "zigzag", the ring for causal queries
    rule: Rule
    folded: float  # what queries are multiplied by once, so that scores need not be
    rows: int  # of queries, over the whole grid, padded
    columns: int  # of keys
    k_block: int  # rows of a block of keys at the most, where they divide
    q_blocks: int  # of one PE, once moved
    k_blocks: int  # of one PE, before it gathers
    repeats: int  # of each head of keys and values
    kv_heads: int  # over the whole grid, repeated and padded
    q_heads: int
    tiles: int  # that a PE of the ring meets
    bias_shared: tuple[str, ...]  # the axes along which all PEs have the same bias

    @property
    def offset(self) -> bool:
        """Whether a PE's queries begin at its place in the sequence, not at its start."""
        return self.order in ("allgather", "ring")


def plan_attention(
    floats: Floats, segments: Segments, options: AttentionOptions, wafer: Wafer | None
) -> tuple[AttentionPlan, str]:
    """What to do, and why so.

    Raises:
      ValueError: the algorithm asked for cannot serve the grid.
    """
    q, k = floats.q, floats.k
    T, S = q.shape[1], k.shape[1]
    order, why = _order(floats, options, wafer)
    height, width = (1, 1) if wafer is None else (wafer.height, wafer.width)
    halves = 2 if order == "zigzag" else 1
    band = _band(options.window)
    block = _BLOCK if band is None else _NARROW
    rows, q_blocks = _blocks(T, height * halves, block)
    columns, k_blocks = _blocks(S, height * halves, block)
    k_blocks, of_keys = (k_blocks, _BLOCK) if band is None else (1, columns)
    if order in ("ulysses", "local"):
        q_blocks = fewest(height * q_blocks, rows, block)
        k_blocks = fewest(height * k_blocks, columns, of_keys)
    repeats, kv_heads = _heads(q.shape[2], k.shape[2], width)
    # A causal query never sees what pads the keys, unless there are more queries than keys.
    padding = columns > S and (not options.causal or T > S)
    scale = q.shape[-1] ** -0.5 if options.scale is None else float(options.scale)
    platform = jax.default_backend() if wafer is None else wafer.platform
    implementation = _vendor(floats, order, wafer)
    # In 16 bits it rounds nothing only where it is a power of two.
    folds = implementation is None and (q.dtype == jnp.float32 or math.frexp(abs(scale))[0] == 0.5)
    single = order not in ("ring", "zigzag") and (
        band is not None or (q_blocks == 1 and columns <= _BLOCK)
    )
    rule = Rule(
        scale=1.0 if folds else scale,
        causal=options.causal,
        window=options.window,
        band=band,
        keys=S if padding else None,
        soft_cap=options.soft_cap,
        skips=not single and (wafer is None or wafer.backend != "virtual"),
        at_once=_BLOCK * _BLOCK if platform == "cpu" else None,
        vendor=implementation,
    )
    return AttentionPlan(
        order=order,
        rule=rule,
        folded=scale if folds else 1.0,
        rows=rows,
        columns=columns,
        k_block=of_keys,
        q_blocks=q_blocks * halves,
        k_blocks=k_blocks * halves,
        repeats=repeats,
        kv_heads=kv_heads,
        q_heads=kv_heads * (q.shape[2] // k.shape[2] // repeats),
        tiles=_tiles(options.window, rows, columns, height),
        bias_shared=shared_axes(floats.bias, order),
    ), why


def fewest(blocks: int, length: int, block: int) -> int:
    """The smallest part of `blocks` that leaves none of a `length` longer than it has to be."""
    longest = max(length // blocks, block)
    return min(m for m in range(1, blocks + 1) if blocks % m == 0 and length // m <= longest)


def _order(floats: Floats, options: AttentionOptions, wafer: Wafer | None) -> tuple[str, str]:
    if wafer is None:
        return "local", "there is one PE, or no wafer"
    heads, pes = floats.k.shape[2], wafer.height * wafer.width
    algorithm, why = options.algorithm, "asked for"
    if algorithm == "auto":
        algorithm, why = _chosen(floats, wafer)
    if algorithm == "ulysses" and heads % pes:
        raise ValueError(
            f"attention: algorithm='ulysses' deals the heads of k to all {pes} PEs of a "
            f"{wafer.height}x{wafer.width} grid, and {heads} do not divide by them; 'ring' and "
            "'allgather' can serve it"
        )
    even = options.causal and floats.q.shape[1] == floats.k.shape[1]
    if algorithm == "ring" and even and options.window is None and floats.bias is None:
        return "zigzag", why
    return algorithm, why


def _chosen(floats: Floats, wafer: Wafer) -> tuple[str, str]:
    k = floats.k
    gathered = 2 * k.size * k.dtype.itemsize
    gathered //= math.prod(wafer.axis_size(axis) for axis in (WAFERS, COLS))
    size = f"{gathered / 2**20:.3g} MiB of keys and values for a PE to gather"
    if fits_gathered(gathered, wafer):
        return "allgather", f"{size} are little on this machine"
    pes = wafer.height * wafer.width
    if wafer.machine is not None:
        return "ring", f"{size} are much, and on a wafer neighbors alone are near"
    if floats.bias is not None:
        return "ring", f"{size} are much, and so a PE needs its own rows of the bias alone"
    if k.shape[2] % pes:
        return "ring", f"{size} are much, and {k.shape[2]} heads do not divide by {pes} PEs"
    return "ulysses", f"{size} are much, and {k.shape[2]} heads divide by {pes} PEs"


def _vendor(floats: Floats, order: str, wafer: Wafer | None) -> Literal["cudnn"] | None:
    """The `implementation` of jax.nn's attention that takes a PE's whole tiles, if one does."""
    q = floats.q
    merging = floats.sinks is not None or order in ("ring", "zigzag")  # a sink is, like a tile
    if merging and not vendor.merges(q.dtype):
        return None
    platform = None if wafer is None or wafer.backend == "virtual" else wafer.platform
    served = q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if platform == "gpu" and served else None


def _band(window: int | None) -> int | None:
    """Keys that a block of queries meets at once, if a window leaves few enough."""
    if window is None or window + _NARROW - 1 > _BAND:
        return None
    return window + _NARROW - 1


def _blocks(length: int, parts: int, block: int) -> tuple[int, int]:
    """A length padded so that each of `parts` has equal blocks, and how many it has."""
    rows = -(-length // parts)
    blocks = -(-rows // block)
    return parts * blocks * -(-rows // blocks), blocks


def _heads(N: int, K: int, width: int) -> tuple[int, int]:
    """How often a head of keys stands, and how many there are, for each PE to have what it needs.

    Heads are repeated only as often as that takes; heads of zeros fill what is left.
    """
    group = N // K

    def of_one_pe(repeats):
        return -(-K * repeats // width) * (group // repeats)

    repeats = min((r for r in range(1, group + 1) if group % r == 0), key=of_one_pe)
    return repeats, -(-K * repeats // width) * width


def _tiles(window: int | None, rows: int, columns: int, height: int) -> int:
    """How many tiles of keys, its own with them, a PE's queries may see."""
    if window is None or rows != columns:
        return height
    return min(height, 1 + -(-(window - 1) // (columns // height)))
