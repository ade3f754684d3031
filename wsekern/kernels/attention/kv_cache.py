"""A key-value cache that decoding appends to, its tokens split along y.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025, for the shift
that keeps the rows of PEs balanced (see `kv_balance`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from wsekern import fabric
from wsekern.kernels.attention import kv_rows
from wsekern.kernels.attention.kv_balance import Balance
from wsekern.kernels.attention.kv_rows import KV, Slots
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer

SLOTS = P(WAFERS, COLS, ROWS, None)  # [B, K, S, H]: products need no transpose, hence no copy
SEQUENCES = P(WAFERS)
NEW = P(WAFERS, None, COLS, None)  # [B, T, K, H], the same in every row of PEs
_PROMPTS = P(WAFERS, ROWS, COLS, None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "lengths"),
    meta_fields=("capacity", "window", "chunk", "heads", "kv_heads", "wafer"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KVCache:
    """Keys and values of the tokens so far, balanced over the rows of PEs.

    Make one with `KVCache.empty`; attend to it with `wsekern.decode_attention`. Sequences lie over
    the wafers, their tokens along y, heads along x. Every row of PEs holds equally many tokens of a
    sequence, plus or minus one, however long it is.

    A token whose values hold NaN or an infinity is kept with a key of NaN and values of 0. A query
    that sees it gets NaN; no other does, nor any sequence that takes its slot later.

    A cache is an immutable pytree. `append` and `fill` return the next one; they update in place
    inside a jit that the cache is donated to. It has no gradient.

    With B sequences and K key-value heads of size H a PE (its share), on p PEs along y:

    - It holds 2 B K H ceil(capacity / p) elements.
    - `append` of T tokens: 2 T B K H words received, in T steps. Rows shift their oldest entry one
      row up where the balance asks for it (WaferLLM's shift); nothing else moves.
    - `fill` with prompts of S tokens: 2 (p - 1) B K H ceil(S / p) words, in p - 1 steps round y.
    """

    # Any: pytree operations put other things than arrays here.
    k: Any  # [B, K, S, H], S the slots of all rows of PEs; B and K padded to the grid
    v: Any  # likewise
    lengths: Any  # [B] int32: the tokens seen of each sequence
    capacity: int
    window: int | None
    chunk: int
    heads: int
    kv_heads: int
    wafer: Wafer | None

    @classmethod
    def empty(
        cls,
        *,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_size: int,
        heads: int | None = None,
        window: int | None = None,
        chunk: int = 1,
        dtype: jax.typing.DTypeLike = jnp.float32,
        wafer: Wafer | None = None,
    ) -> KVCache:
        """A cache of `batch` sequences without a token.

        A PE holds 2 B K H ceil(capacity / height) elements, with B and K its share of sequences and
        heads.

        Args:
          batch: how many sequences.
          capacity: how many tokens a sequence may have.
          kv_heads: heads of keys and values.
          head_size: features of a head.
          heads: heads of the queries; by default `kv_heads`. Where key-value heads are fewer than
            PEs along x, they are repeated to share out the queries, as far as that costs a PE no
            memory.
          window: how many tokens a query sees, its own included. Older ones are dropped, and a
            sequence may then have any length.
          chunk: how many of its newest tokens a sequence attends with at once. With a window, so
            many tokens less one are kept beside it.
          dtype: of keys and values.
          wafer: where it lives; by default the current wafer, and one device without one.

        Raises:
          ValueError: a size is not positive, `heads` is not a multiple of `kv_heads`, or `dtype` is
            not floating.
        """
        heads = kv_heads if heads is None else heads
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "heads": heads}
        sizes |= {"head_size": head_size, "chunk": chunk, "window": 1 if window is None else window}
        check_sizes("KVCache.empty", sizes, dtype)
        cache = cls(
            k=None,
            v=None,
            lengths=jnp.zeros(batch, jnp.int32),
            capacity=capacity,
            window=window,
            chunk=chunk,
            heads=heads,
            kv_heads=kv_heads,
            wafer=context.resolve(wafer),
        )
        return cache._allocate(head_size, jnp.dtype(dtype))

    @property
    def balance(self) -> Balance:
        """Which row of PEs holds which tokens."""
        needed = self.capacity if self.window is None else self.window + self.chunk - 1
        return Balance(
            rows=1 if self.wafer is None else self.wafer.height,
            max_tokens=min(needed, self.capacity),
            slides=self.window is not None and needed <= self.capacity,
        )

    @property
    def full(self) -> Bool[Array, " B"]:
        """Which sequences have no room for another token."""
        balance = self.balance
        return self.lengths >= (np.iinfo(np.int32).max if balance.slides else balance.max_tokens)

    @property
    def repeats(self) -> int:
        """How often each head of keys and values is held along x."""
        return repeated_heads(self.heads, self.kv_heads, self.wafer)

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        active: Bool[Array, " B"] | None = None,
    ) -> KVCache:
        """The cache with T more tokens of each sequence.

        A PE receives 2 T B K H words (B and K its share) in T steps, one for each token: rows pass
        their oldest entry one row up where the balance asks for it, and the bottom row takes the
        new one. No other entry moves, wherever the sequence ends. On devices, in a jit that the
        cache is donated to, nothing of it is copied; virtual PEs rearrange all of it.

        A full sequence raises where `lengths` is known. Where it is traced, the sequence keeps its
        tokens and its length, and the new ones are dropped; ask `full`.

        Args:
          k: keys of the new tokens, laid out `P("wafer", None, "x", None)`.
          v: values, laid out likewise.
          active: which sequences grow; by default all.

        Raises:
          ValueError: shapes or dtypes do not fit the cache, or a sequence has no room left.
        """
        _check_tokens("append", self, k, v)
        tokens, active = k.shape[1], _check_active("append", self, active)
        _check_room(self, active, tokens)
        after = self.balance.lengths_after(self.lengths, active, tokens)
        return self._run(kv_rows.append, NEW, (k, v), self.lengths, active, after)

    def fill(
        self,
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        lengths: Integer[Array, " B"] | None = None,
        *,
        active: Bool[Array, " B"] | None = None,
    ) -> KVCache:
        """The cache with these prompts and nothing else; with a window, only their last tokens.

        Tiles of the prompts go once round y, and each PE takes the tokens that it is to hold: it
        receives 2 (p - 1) B K H ceil(S / p) words in p - 1 steps on p PEs along y, and holds two
        tiles.

        Args:
          k: keys of the prompts, laid out `P("wafer", "y", "x", None)`, as for `attention`.
          v: values, laid out likewise.
          lengths: how many of the S tokens each prompt has; by default all. Traced lengths are cut
            to S and to the capacity.
          active: which sequences are replaced; by default all.

        Raises:
          ValueError: shapes or dtypes do not fit the cache, or a prompt is longer than S or than
            the capacity.
        """
        _check_tokens("fill", self, k, v)
        active = _check_active("fill", self, active)
        room = k.shape[1] if self.balance.slides else min(k.shape[1], self.capacity)
        whole = jnp.full_like(self.lengths, k.shape[1])
        lengths = whole if lengths is None else layout.as_array(lengths)
        _check_lengths(self, lengths, active, room, k.shape[1])
        lengths = _lay_out_lengths(jnp.clip(lengths, 0, room).astype(jnp.int32), self.wafer)
        after = jnp.where(active, lengths, self.lengths)
        return self._run(kv_rows.fill, _PROMPTS, (k, v), after, active, after)

    def _allocate(self, head_size: int, dtype: np.dtype) -> KVCache:
        slots = self.balance.slots * self.balance.rows
        shape = (len(self.lengths), self.kv_heads * self.repeats, slots, head_size)
        if self.wafer is None:
            return dataclasses.replace(self, k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))
        whole = layout.padded_shape(shape, SLOTS, self.wafer)
        tile = tuple(
            size // math.prod(self.wafer.axis_size(axis) for axis in axes_of(entry))
            for size, entry in zip(whole, SLOTS, strict=True)
        )
        # Made where it lives: whole, it might not fit one device.
        kernel = functools.partial(_zeros_per_pe, shape=tile, dtype=dtype)
        run = self.wafer.map(kernel, in_specs=P(), out_specs=SLOTS)
        k, v = run(self.lengths)
        return dataclasses.replace(
            self, k=k, v=v, lengths=_lay_out_lengths(self.lengths, self.wafer)
        )

    def _run(
        self,
        kernel: Callable[..., KV],
        spec: P,
        tokens: tuple[Float[Array, "B _ K H"], Float[Array, "B _ K H"]],
        lengths: Int[Array, " B"],
        active: Bool[Array, " B"],
        after: Int[Array, " B"],
    ) -> KVCache:
        """The next cache: `kernel` takes in `tokens`, laid out by `spec`.

        Args:
          kernel: `append` or `fill` of `kv_rows`.
          spec: of the tokens.
          tokens: keys and values.
          lengths: handed to the kernel.
          active: which sequences change.
          after: the lengths of the next cache.
        """
        wafer = self.wafer
        if wafer is None:
            k, v = _local(kernel, self.k, self.v, *tokens, lengths, active, self.balance)
            return dataclasses.replace(self, k=k, v=v, lengths=after)
        tiles = (_lay_out_tokens(x, spec, self) for x in tokens)
        sequences = (layout.pad(x, SEQUENCES, wafer) for x in (lengths, active))
        specs = (SLOTS, SLOTS, spec, spec, SEQUENCES, SEQUENCES)
        run = functools.partial(kernel, balance=self.balance)
        mapped = wafer.map(run, in_specs=specs, out_specs=SLOTS)
        k, v = mapped(self.k, self.v, *tiles, *sequences)
        return dataclasses.replace(self, k=k, v=v, lengths=_lay_out_lengths(after, wafer))


def repeated_heads(heads: int, kv_heads: int, wafer: Wafer | None) -> int:
    """How often each head of keys and values is held along x, to share out the queries.

    Args:
      heads: heads of the queries.
      kv_heads: heads of keys and values.
      wafer: where they lie.
    """
    width, group = 1 if wafer is None else wafer.width, heads // kv_heads

    # First as little memory on a PE as there can be, then as few query heads.
    def kv_and_query_heads_of_a_pe(repeats: int) -> tuple[int, int]:
        heads_of_a_pe = -(-kv_heads * repeats // width)
        return heads_of_a_pe, heads_of_a_pe * (group // repeats)

    divisors = (r for r in range(1, group + 1) if group % r == 0)
    return min(divisors, key=kv_and_query_heads_of_a_pe)


def _lay_out_lengths(x: Shaped[Array, " B"], wafer: Wafer | None) -> Shaped[Array, " B"]:
    """`x`, one for each sequence, along the wafers, or whole on each where it does not divide."""
    # Left to XLA, the layout of the lengths might change from step to step: another program.
    if wafer is None:
        return x
    return wafer.shard(x, P() if len(x) % wafer.wafers else SEQUENCES)


def _zeros_per_pe(lengths: Int[Array, " _"], shape: tuple[int, ...], dtype: np.dtype) -> KV:
    del lengths  # virtual PEs need an operand
    zeros = fabric.varying(jnp.zeros(shape, dtype))
    return zeros, zeros


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnums=(0, 7), inline=True)
def _local(
    kernel: Callable[..., KV],
    k: Slots,
    v: Slots,
    new_k: Float[Array, "B _ K H"],
    new_v: Float[Array, "B _ K H"],
    lengths: Int[Array, " B"],
    active: Bool[Array, " B"],
    balance: Balance,
) -> KV:
    return kernel(k, v, new_k, new_v, lengths, active, balance)


def _lay_out_tokens(x: Float[Array, "B _ K H"], spec: P, cache: KVCache) -> Float[Array, "_ _ _ H"]:
    """Keys or values, repeated and padded to the heads that the cache holds, and to the grid."""
    wafer = cache.wafer
    assert wafer is not None
    if cache.repeats > 1:
        x = layout.repeat(x, cache.repeats, 2, spec, wafer)
    return layout.pad(x, spec, wafer)


def _check_active(
    operation: str, cache: KVCache, active: Bool[Array, " B"] | None
) -> Bool[Array, " B"]:
    if active is None:
        return _lay_out_lengths(jnp.ones(cache.lengths.shape, jnp.bool_), cache.wafer)
    active = layout.as_array(active)
    if active.shape != cache.lengths.shape or active.dtype != jnp.bool_:
        raise ValueError(
            f"KVCache.{operation}: active is {active.dtype}{list(active.shape)}, it must be "
            f"bool{list(cache.lengths.shape)}: one for each sequence"
        )
    return _lay_out_lengths(active, cache.wafer)


def check_sizes(operation: str, sizes: dict[str, int], dtype: jax.typing.DTypeLike) -> None:
    """Raises ValueError if a cache cannot have these sizes, or this dtype."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{operation}: {name} is {size!r}, it must be an integer of 1 or more")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(
            f"{operation}: heads={sizes['heads']} is not a multiple of kv_heads={sizes['kv_heads']}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{operation}: dtype is {jnp.dtype(dtype)}, it must be a floating dtype")


def _check_tokens(
    operation: str, cache: KVCache, k: Shaped[Array, "..."], v: Shaped[Array, "..."]
) -> None:
    sizes = (
        (0, len(cache.lengths), "sequences"),
        (2, cache.kv_heads, "heads"),
        (3, cache.k.shape[3], "features a head"),
    )
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"KVCache.{operation}: {name} is {x.shape}, it must have four dimensions: batch, "
                "sequence, heads, head size"
            )
        for axis, size, meaning in sizes:
            if x.shape[axis] != size:
                raise ValueError(
                    f"KVCache.{operation}: {name} is {x.shape}: it has {x.shape[axis]} {meaning}, "
                    f"the cache {size}"
                )
        if x.dtype != cache.k.dtype:
            raise ValueError(
                f"KVCache.{operation}: {name} is {x.dtype}, the cache is {cache.k.dtype}: cast it, "
                "or make the cache in its dtype"
            )
    if k.shape != v.shape or not k.shape[1]:
        raise ValueError(
            f"KVCache.{operation}: k is {k.shape} and v is {v.shape}: they must be alike, and not "
            "empty"
        )


def _check_room(cache: KVCache, active: Bool[Array, " B"], tokens: int) -> None:
    if cache.balance.slides or any(map(_is_traced, (cache.lengths, active))):
        return
    lengths = np.asarray(cache.lengths)
    beyond = np.asarray(active) & (lengths + tokens > cache.capacity)
    if beyond.any():
        index = int(beyond.argmax())
        raise ValueError(
            f"KVCache.append: sequence {index} has {lengths[index]} tokens, {tokens} more are "
            f"beyond the capacity of {cache.capacity}: the cache is full; make it larger, or leave "
            "the sequence out by active="
        )


def _check_lengths(
    cache: KVCache,
    lengths: Shaped[Array, "..."],
    active: Bool[Array, " B"],
    room: int,
    S: int,
) -> None:
    if lengths.shape != cache.lengths.shape or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"KVCache.fill: lengths is {lengths.dtype}{list(lengths.shape)}, it must be "
            f"integers{list(cache.lengths.shape)}: one for each sequence"
        )
    if any(map(_is_traced, (lengths, active))):
        return
    known = np.asarray(lengths)
    beyond = np.asarray(active) & ((known > room) | (known < 0))
    if beyond.any():
        index = int(beyond.argmax())
        raise ValueError(
            f"KVCache.fill: lengths[{index}] is {known[index]}, it must be from 0 to {room}: the "
            f"prompts have {S} tokens, the cache a capacity of {cache.capacity}"
        )


def _is_traced(x: Shaped[Array, "..."]) -> bool:
    return isinstance(x, jax.core.Tracer)
