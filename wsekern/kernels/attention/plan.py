"""Plan attention on a grid: which algorithm, in which sizes and blocks, and why."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax

from wsekern.hardware import accelerator
from wsekern.kernels.attention.implementation import (
    Implementation,
    Kernel,
    TileTask,
    choose_implementation,
    refused,
)
from wsekern.kernels.attention.mask import Rule
from wsekern.kernels.attention.operands import (
    Floats,
    Order,
    PaddedSizes,
    Segments,
    bias_shared_along,
)
from wsekern.wafer.axes import COLS, WAFERS
from wsekern.wafer.keywords import Requirement
from wsekern.wafer.limits import fits_gathered
from wsekern.wafer.platforms import Platform
from wsekern.wafer.wafer import Wafer

Algorithm = Literal["auto", "ring", "allgather", "ulysses"]

_BLOCK = 512  # rows of a block inside a PE
_GATHERED_ON_CPUS = 2**20  # bytes; beyond, copying them costs more than one more collective
_NARROW = 128  # a product with fewer rows than this runs at a worse rate
_BAND = _BLOCK * _BLOCK // _NARROW  # keys that _NARROW rows meet at once: a block's worth of scores
_KEPT_BYTES = 16 * 2**20  # of a group of heads on a TPU; beyond, groups take turns
_KERNEL_ROWS = 128  # a Pallas kernel's tile is a multiple of so many rows

# Of keywords with two names; `AttentionOptions` checks the others.
REQUIREMENTS = {
    "causal": Requirement(
        lambda value: jnp.isscalar(value) and value in (False, True), "True or False"
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What the caller asks for, apart from the operands.

    Raises:
      ValueError: `algorithm` or `implementation` is unknown, `window` is below 1 or not causal, or
        `soft_cap` is not positive.
    """

    causal: bool = False
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    precision: lax.PrecisionLike = None
    algorithm: str = "auto"
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        for name, kind in (("algorithm", Algorithm), ("implementation", Implementation)):
            if (value := getattr(self, name)) not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"attention: {name}={value!r} is not one of {known}")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"attention: window={self.window} must be 1 or more: it counts the query's own key"
            )
        if self.window is not None and not self.causal:
            raise ValueError(
                f"attention: window={self.window} looks back from each query; it needs causal=True"
            )
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"attention: soft_cap={self.soft_cap} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What every PE does."""

    order: Order
    rule: Rule
    sizes: PaddedSizes
    query_scale: float  # multiplies the queries once, so that scores need not be scaled
    key_scale: float  # likewise the keys; of the two and the rule's scale two are 1
    k_block: int  # the longest block of keys to make, where lengths divide
    q_blocks: int  # blocks of queries of one PE, after its heads or rows are moved
    k_blocks: int  # blocks of keys of one PE, before it gathers others
    ring_tiles: int  # tiles of keys that a PE meets in the ring, its own included
    bias_shared: tuple[str, ...]  # axes along which all PEs hold the same part of the bias
    head_groups: int  # of a PE's heads: one travels while another is computed
    takes_turns: bool  # each group waits for the one before: less memory, and less is hidden
    balanced: bool  # rows are exchanged so that every PE has the same work, keys gathered

    @property
    def starts_at_place(self) -> bool:
        """Whether a PE's queries are a part of the sequence; if not, they begin at position 0."""
        return self.order in ("allgather", "ring")

    @property
    def gathers_by_shifts(self) -> bool:
        """Whether the keys are gathered by moves, and not by one collective."""
        return self.rule.implementation == "splash" and self.order == "allgather"

    @property
    def merges(self) -> bool:
        """Whether a row's result is made of several tiles."""
        return self.order in ("ring", "zigzag")

    @property
    def whole_tiles(self) -> bool:
        """Whether a tile is one block, which a Pallas kernel cuts by itself."""
        return self.rule.implementation in ("splash", "pallas")

    @property
    def gives_lse(self) -> bool:
        """Whether the kernel gives the rows' log-sum-exps; if not, the gradient needs none."""
        return self.rule.implementation != "cudnn"


class Choice(NamedTuple):
    """A plan, why it has its algorithm, and what computes its tiles and why."""

    plan: AttentionPlan
    why: str
    tiles: str


def plan_attention(
    floats: Floats,
    segments: Segments,
    options: AttentionOptions,
    wafer: Wafer | None,
    platform: Platform,
) -> Choice:
    """The plan, and why it is so.

    Raises:
      ValueError: the algorithm asked for cannot serve the grid, or the implementation the tiles.
    """
    task = TileTask(
        floats=floats,
        segments=segments,
        causal=options.causal,
        window=options.window,
        soft_cap=options.soft_cap,
        precise=options.precision is not None,
        order="local",
        wafer=wafer,
        platform=platform,
    )
    order, why = _choose_order(task, options)
    kernel, tiles = choose_implementation(
        dataclasses.replace(task, order=order), options.implementation
    )
    return Choice(_plan_tiles(task, options, order, kernel), why, tiles)


def _plan_tiles(
    task: TileTask, options: AttentionOptions, order: Order, kernel: Kernel
) -> AttentionPlan:
    floats, wafer, platform = task.floats, task.wafer, task.platform
    q, k = floats.q, floats.k
    T, S = q.shape[1], k.shape[1]
    height, width = (1, 1) if wafer is None else (wafer.height, wafer.width)
    halves = 2 if order == "zigzag" else 1
    band = _band(options.window) if kernel == "xla" else None
    # Queries with a narrow window meet only a band of keys, so they come in short blocks, and the
    # keys that bands are cut from stay in one.
    block = _BLOCK if band is None else _NARROW
    cut = _tiles if kernel in ("splash", "pallas") else functools.partial(_blocks, block=block)
    rows, q_blocks = cut(T, height * halves)
    columns, k_blocks = cut(S, height * halves)
    k_blocks, k_block = (k_blocks, _BLOCK) if band is None else (1, columns)
    if kernel in ("splash", "pallas"):
        k_block = columns
    elif order in ("ulysses", "local"):
        q_blocks = fewest_blocks(height * q_blocks, rows, block)
        k_blocks = fewest_blocks(height * k_blocks, columns, k_block)
    repeats, kv_heads = _heads(q.shape[2], k.shape[2], width)
    # A causal query never sees the padding of the keys, unless there are more queries than keys.
    padding_seen = columns > S and (not options.causal or T > S)
    query_scale, key_scale, score_scale = _scales(floats, options.scale, kernel)
    balanced = kernel == "splash" and order == "allgather" and _pays_to_balance(task, options, rows)
    rows_see_keys = floats.bias is None and task.segments.q is task.segments.k
    rows_see_keys &= options.window is None or T < S + options.window
    # Of the tiles of a ring, those in zig-zag order alone are met by rows that see some of them.
    rows_see_keys &= order != "ring" and (order != "zigzag" or task.segments.q is None)
    groups, large = _head_groups(floats, order, kernel, rows, columns, kv_heads // width, height)
    one_pair = order not in ("ring", "zigzag") and (
        band is not None or (q_blocks == 1 and columns <= _BLOCK)
    )
    rule = Rule(
        scale=score_scale,
        causal=options.causal,
        window=options.window,
        band=band,
        keys=S if padding_seen else None,
        soft_cap=options.soft_cap,
        skips_blocks=not one_pair and (wafer is None or wafer.backend != "virtual"),
        row_starts=_row_starts(order, balanced, rows, columns, height),
        rows_see_keys=rows_see_keys,
        scores_at_once=_BLOCK * _BLOCK if platform == "cpu" else None,
        precision=options.precision,
        implementation=kernel,
        platform=platform,
    )
    return AttentionPlan(
        order=order,
        rule=rule,
        sizes=PaddedSizes(
            queries=rows,
            keys=columns,
            q_heads=kv_heads * (q.shape[2] // k.shape[2] // repeats),
            kv_heads=kv_heads,
            repeats=repeats,
        ),
        query_scale=query_scale,
        key_scale=key_scale,
        k_block=k_block,
        q_blocks=q_blocks * halves,
        k_blocks=k_blocks * halves,
        ring_tiles=_ring_tiles(options.window, rows, columns, height),
        bias_shared=bias_shared_along(floats.bias, order),
        head_groups=groups,
        takes_turns=large,
        balanced=balanced,
    )


def fewest_blocks(blocks: int, length: int, longest: int) -> int:
    """The smallest divisor of `blocks` that cuts `length` into blocks of at most `longest` rows.

    Blocks that are longer already are not cut further.
    """
    longest = max(length // blocks, longest)
    return min(m for m in range(1, blocks + 1) if blocks % m == 0 and length // m <= longest)


def ulysses_refused(floats: Floats, wafer: Wafer) -> str:
    """Why `ulysses` cannot serve; empty where it can."""
    heads, pes = floats.k.shape[2], wafer.height * wafer.width
    return f"{heads} heads do not divide by {pes} PEs" if heads % pes else ""


def zigzag_refused(floats: Floats, options: AttentionOptions) -> str:
    """Why the ring is not taken in zig-zag order; empty where it is."""
    if not options.causal:
        return "for causal attention only"
    if floats.q.shape[1] != floats.k.shape[1]:
        return "needs as many keys as queries"
    if options.window is not None:
        return "a window is served by the ring in order"
    return "" if floats.bias is None else "a bias is served by the ring in order"


def _choose_order(task: TileTask, options: AttentionOptions) -> tuple[Order, str]:
    floats, wafer = task.floats, task.wafer
    if wafer is None:
        return "local", "there is one PE, or no wafer"
    algorithm, why = options.algorithm, "asked for"
    if algorithm == "auto":
        algorithm, why = _choose_algorithm(task, options, wafer)
    if algorithm == "ulysses":
        if ulysses_refused(floats, wafer):
            heads, pes = floats.k.shape[2], wafer.height * wafer.width
            raise ValueError(
                f"attention: algorithm='ulysses' deals the heads of k to all {pes} PEs of a "
                f"{wafer.height}x{wafer.width} grid, and {heads} do not divide by them; 'ring' and "
                "'allgather' can serve it"
            )
        return "ulysses", why
    if algorithm == "allgather":
        return "allgather", why
    return "ring" if zigzag_refused(floats, options) else "zigzag", why


def _choose_algorithm(task: TileTask, options: AttentionOptions, wafer: Wafer) -> tuple[str, str]:
    floats, k = task.floats, task.floats.k
    asked = options.implementation
    if asked != "auto" and asked != "xla":
        return _algorithm_served_by(asked, task, options)
    gathered = 2 * k.size * k.dtype.itemsize
    gathered //= math.prod(wafer.axis_size(axis) for axis in (WAFERS, COLS))
    size = f"{gathered / 2**20:.3g} MiB of keys and values"
    pes = wafer.height * wafer.width
    undealt = ulysses_refused(floats, wafer)
    on_cpus = wafer.machine is None and wafer.platform == "cpu"
    if on_cpus and gathered > _GATHERED_ON_CPUS and floats.bias is None and not undealt:
        return "ulysses", f"each of {pes} CPU devices would copy {size}, and the heads divide"
    whole, part = (dataclasses.replace(task, order=o) for o in ("ulysses", "allgather"))
    if not undealt and not refused("cudnn", whole) and refused("cudnn", part):
        return "ulysses", f"cuDNN serves whole sequences, and {k.shape[2]} heads divide by {pes}"
    if fits_gathered(gathered, wafer):
        return "allgather", f"a PE may gather {size} on this machine"
    size = f"{size} are too much for a PE to gather"
    if wafer.machine is not None:
        return "ring", f"{size}, and on a wafer only neighbors are near"
    if floats.bias is not None:
        return "ring", f"{size}, and in a ring it needs only its own rows of the bias"
    if undealt:
        return "ring", f"{size}, and {undealt}"
    return "ulysses", f"{size}, and {k.shape[2]} heads divide by {pes} PEs"


def _algorithm_served_by(
    kernel: Kernel, task: TileTask, options: AttentionOptions
) -> tuple[str, str]:
    """The first algorithm whose tiles the kernel asked for serves."""
    assert task.wafer is not None
    ring: Order = "ring" if zigzag_refused(task.floats, options) else "zigzag"
    orders: dict[str, Order] = {"allgather": "allgather", "ulysses": "ulysses", "ring": ring}
    for name, order in orders.items():
        impossible = order == "ulysses" and ulysses_refused(task.floats, task.wafer)
        if not impossible and not refused(kernel, dataclasses.replace(task, order=order)):
            return name, f"its tiles are served by {kernel}, which is asked for"
    return "allgather", f"{kernel} is asked for"


def _scales(floats: Floats, scale: float | None, kernel: Kernel) -> tuple[float, float, float]:
    """What to multiply the queries, the keys and the scores by; two of the three are 1.

    Queries are fewer than scores, so scale those, but only where it rounds nothing: in float32, or
    in 16 bits by a power of two. Kernels for GPUs scale the scores. Splash attention does not scale
    at all, so there the keys are scaled, of which there are fewest; in bfloat16 each is rounded
    once more.
    """
    q = floats.q
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    exact = q.dtype == jnp.float32 or math.frexp(abs(scale))[0] == 0.5
    if kernel == "splash":
        return 1.0, scale, 1.0
    return (scale, 1.0, 1.0) if kernel == "xla" and exact else (1.0, 1.0, scale)


def _band(window: int | None) -> int | None:
    """Keys that a block of queries meets at once, where a window leaves few enough."""
    if window is None or window + _NARROW - 1 > _BAND:
        return None
    return window + _NARROW - 1


def _blocks(length: int, parts: int, block: int) -> tuple[int, int]:
    """A length padded so that each of `parts` has blocks of equal length, and how many it has."""
    rows = -(-length // parts)
    blocks = -(-rows // block)
    return parts * blocks * -(-rows // blocks), blocks


def _tiles(length: int, parts: int) -> tuple[int, int]:
    """A length padded so that each of `parts` is one block of whole lanes."""
    rows = -(-length // parts)
    # Where rows are added anyway, add as many as let a Pallas kernel take long blocks.
    unit = _KERNEL_ROWS if rows % _KERNEL_ROWS == 0 or rows < 8 * _BLOCK else _BLOCK
    return parts * -(-rows // unit) * unit, 1


def _pays_to_balance(task: TileTask, options: AttentionOptions, rows: int) -> bool:
    """Whether exchanging rows saves a chip more than it costs: in order, the last PE has most work.

    The last of p PEs computes (2p-1)/p of what each does in zig-zag order. Forward and backward
    have seven products, and exchange half a tile of queries four times.
    """
    wafer = task.wafer
    if wafer is None or wafer.height == 1 or zigzag_refused(task.floats, options):
        return False
    if rows % (2 * wafer.height * _KERNEL_ROWS):
        return False
    chip = accelerator(wafer.device_kind or "")
    if chip is None or not chip.link_bytes_per_second:
        return True
    q = task.floats.q
    saved = 7 * q.shape[1] * (wafer.height - 1) / wafer.height / chip.bfloat16_flops
    return saved > 2 * q.dtype.itemsize / chip.link_bytes_per_second


def _head_groups(
    floats: Floats,
    order: Order,
    kernel: Kernel,
    rows: int,
    keys: int,
    kv_heads: int,
    height: int,
) -> tuple[int, bool]:
    """`AttentionPlan.head_groups` and `takes_turns`, for padded lengths and a PE's heads of keys.

    On a TPU gathered keys travel in two groups. Where what a group keeps is large, groups are as
    many as make it small, and take turns.
    """
    if kernel != "splash" or order not in ("allgather", "ring", "zigzag"):
        return 1, False
    B, _, N, H = floats.q.shape
    row = B * H * floats.q.dtype.itemsize
    kept = 2 * kv_heads * keys * row
    if order != "allgather":  # a ring keeps its own rows, and sums in float32
        kept = 2 * kv_heads * (N // floats.k.shape[2]) * rows // height * row
    divisors = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0]
    groups = next((n for n in divisors if kept <= n * _KEPT_BYTES), kv_heads)
    large = groups > 1
    return (max(groups, math.gcd(kv_heads, 2)) if order == "allgather" else groups), large


def _row_starts(
    order: Order, balanced: bool, rows: int, columns: int, height: int
) -> tuple[tuple[int, ...], ...] | None:
    """`Rule.row_starts` of an order, for lengths that are padded."""
    tile = rows // height
    if balanced:
        half = tile // 2
        return tuple((2 * i * half, (2 * (height - i) - 1) * half) for i in range(height))
    if order == "allgather":
        return tuple((i * tile,) for i in range(height))
    if order == "ring":
        keys = columns // height
        return tuple((i * tile - j * keys,) for i in range(height) for j in range(height))
    return ((0,),)


def _heads(N: int, K: int, width: int) -> tuple[int, int]:
    """How often to repeat each key-value head, and how many heads there are then, padded.

    Heads are repeated only as often as gives a PE the fewest query heads; heads of zeros fill up
    the last PEs. For N = 12 query heads and K = 3 on 4 PEs along x:

        repeats   heads   of a PE   query heads that a PE serves
        1         3       1         4
        2         6       2         4
        4         12      3         3   <- taken
    """
    group = N // K

    def query_heads_of_a_pe(repeats: int) -> int:
        return -(-K * repeats // width) * (group // repeats)

    repeats = min((r for r in range(1, group + 1) if group % r == 0), key=query_heads_of_a_pe)
    return repeats, -(-K * repeats // width) * width


def _ring_tiles(window: int | None, rows: int, columns: int, height: int) -> int:
    """How many tiles of keys, its own included, a PE's queries may see."""
    if window is None or rows != columns:
        return height
    return min(height, 1 + -(-(window - 1) // (columns // height)))
