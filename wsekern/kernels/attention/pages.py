"""A key-value cache in pages, which sequences share, and attention to it.

W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
2023. Softmax by pages: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax",
2018.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from wsekern import fabric
from wsekern.kernels.attention.kv_cache import check_sizes, repeated_heads
from wsekern.kernels.attention.kv_rows import mark_not_finite
from wsekern.kernels.attention.mask import LOWEST
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer

KEYS = P(None, COLS, None, ROWS)  # [L * P, K, H, S]
VALUES = P(None, COLS, ROWS, None)  # [L * P, K, S, H]
SCALES = P(None, COLS, ROWS)  # [L * P, K, S]
TOKENS = P(None, None, COLS, None)  # [B, T, heads, H], the same in every row of PEs

_MOST_ROWS = 32  # of one product

_Pages = tuple[Array, ...]  # keys and values; in eight bits, the scales of both too


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "k_scale", "v_scale"),
    meta_fields=("layers", "heads", "kv_heads", "wafer"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KVPages:
    """Keys and values of many sequences, in pages of equally many tokens.

    Make one with `KVPages.empty`; attend to it with `wsekern.paged_attention`. Which pages a
    sequence has, and which sequences share one, is for the caller to keep, in tables: entry c of a
    sequence's table is the page of its tokens c S to (c + 1) S - 1, for pages of S tokens. Every
    layer has the same table.

    Heads lie along x. The tokens of a page are dealt out along y, so that every row of PEs holds
    equally many tokens of a sequence, plus or minus one. A PE holds 2 L P K H S / height elements,
    with K its share of the heads, L layers and P pages.

    In int8 a token has a scale for its keys in each head, and one for its values: float32, the
    largest magnitude over 127. That takes (H + 4) / 4 H of the memory of float32.

    A token whose values hold NaN or an infinity is kept with a key of NaN and values of 0. A query
    that sees it gets NaN; no other does, nor any sequence that takes the page later.

    It is an immutable pytree. `write` returns the next one, and updates in place inside a jit that
    it is donated to. It has no gradient.
    """

    # Any: pytree operations put other things than arrays here.
    k: Any  # [L * P, K, H, S]: a product with queries needs no transposed copy
    v: Any  # [L * P, K, S, H]
    k_scale: Any  # [L * P, K, S] float32 where keys are int8, else None
    v_scale: Any
    layers: int
    heads: int
    kv_heads: int
    wafer: Wafer | None

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        pages: int,
        page_tokens: int,
        kv_heads: int,
        head_size: int,
        heads: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        wafer: Wafer | None = None,
    ) -> KVPages:
        """Pages without a token.

        Args:
          layers: how many layers the model has.
          pages: how many pages each layer has.
          page_tokens: how many tokens a page holds, a multiple of the wafer's height.
          kv_heads: heads of keys and values.
          head_size: features of a head.
          heads: heads of the queries; by default `kv_heads`. Where key-value heads are fewer than
            PEs along x, they are repeated to share out the queries, as far as that costs a PE no
            memory.
          dtype: of keys and values: floating, or int8.
          wafer: where they live; by default the current wafer, and one device without one.

        Raises:
          ValueError: a size is not positive, `heads` is not a multiple of `kv_heads`,
            `page_tokens` not one of the height, or `dtype` is neither floating nor int8.
        """
        in_int8 = jnp.dtype(dtype) == jnp.int8
        heads = kv_heads if heads is None else heads
        wafer = context.resolve(wafer)
        sizes = {"layers": layers, "pages": pages, "page_tokens": page_tokens}
        sizes |= {"kv_heads": kv_heads, "heads": heads, "head_size": head_size}
        check_sizes("KVPages.empty", sizes, jnp.float32 if in_int8 else dtype)
        if wafer is not None and page_tokens % wafer.height:
            raise ValueError(
                f"KVPages.empty: page_tokens={page_tokens} is not a multiple of the wafer's "
                f"height, {wafer.height}"
            )
        cache = cls(
            k=None,
            v=None,
            k_scale=None,
            v_scale=None,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            wafer=wafer,
        )
        rows, K = layers * pages, kv_heads * cache.repeats
        k = _zeros((rows, K, head_size, page_tokens), dtype, KEYS, wafer)
        v = _zeros((rows, K, page_tokens, head_size), dtype, VALUES, wafer)
        if not in_int8:
            return dataclasses.replace(cache, k=k, v=v)
        k_scale, v_scale = (
            _zeros((rows, K, page_tokens), jnp.float32, SCALES, wafer) for _ in range(2)
        )
        return dataclasses.replace(cache, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    @property
    def arrays(self) -> _Pages:
        """Keys, values, and in int8 the scales of both."""
        in_int8 = self.k_scale is not None
        return (self.k, self.v, self.k_scale, self.v_scale) if in_int8 else (self.k, self.v)

    def with_arrays(self, arrays: _Pages) -> KVPages:
        """The cache with other keys, values and scales, in the order of `arrays`."""
        k, v, *scales = arrays
        k_scale, v_scale = scales or (None, None)
        return dataclasses.replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    @property
    def page_tokens(self) -> int:
        """How many tokens a page holds."""
        return self.k.shape[-1]

    @property
    def pages(self) -> int:
        """How many pages each layer has."""
        return self.k.shape[0] // self.layers

    @property
    def repeats(self) -> int:
        """How often each head of keys and values is held along x."""
        return repeated_heads(self.heads, self.kv_heads, self.wafer)

    def write(
        self,
        layer: Int[Array, ""] | int,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        tables: Int[Array, "B C"],
        positions: Int[Array, "B T"],
    ) -> KVPages:
        """The cache with these tokens of one layer; nothing moves between PEs.

        Args:
          layer: which one, from 0.
          k: keys, laid out `P(None, None, "x", None)`; cast or rounded to the cache's dtype.
          v: values, laid out likewise.
          tables: the pages of each sequence.
          positions: where each token stands in its sequence; -1 for one that is not written.

        Raises:
          ValueError: shapes do not fit the cache.
        """
        _check_tokens("KVPages.write", self, k, self.kv_heads, tables, positions)
        _check_tokens("KVPages.write", self, v, self.kv_heads, tables, positions)
        base = jnp.asarray(layer, jnp.int32) * self.pages
        if self.wafer is None:
            return self.with_arrays(_write(self.arrays, k, v, tables, positions, base, rows=None))
        k, v = (self._lay_out(x, TOKENS) for x in (k, v))
        kernel = functools.partial(_write, rows=self.wafer.height)
        specs = _specs(self)
        in_specs = (specs, TOKENS, TOKENS, P(), P(), P())
        run = self.wafer.map(kernel, in_specs=in_specs, out_specs=specs)
        return self.with_arrays(run(self.arrays, k, v, tables, positions, base))

    def _lay_out(self, x: Float[Array, "B T K H"], spec: P) -> Float[Array, "B T _ H"]:
        """Keys or values, repeated and padded to the heads that the cache holds."""
        assert self.wafer is not None
        if self.repeats > 1:
            x = layout.repeat(x, self.repeats, 2, spec, self.wafer)
        return layout.pad(x, spec, self.wafer)


def paged_attention(
    q: Float[Array, "B T N H"],
    cache: KVPages,
    layer: Int[Array, ""] | int,
    tables: Int[Array, "B C"],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` of tokens over their sequences, whose pages are in `tables`.

    The cache already has the keys and values of the T tokens; each of them sees itself and those
    before it. Query head n attends to head n // (N / K) of the cache. The softmax is in float32.
    There is no gradient.

    Pages are taken in their order, one after another, and only as many as the longest sequence has.
    A page that a query does not see leaves its sums as they are, to the last bit. So the result
    does not depend on the other sequences, on the capacity of the tables, or on how many tokens are
    asked for at once, as far as the products of the device do not: on a CPU, those of 2 to 32 rows
    are equal.

    A PE attends to its share of each page. Then two all-reduces along y follow one another: the
    highest scores, B T N words, and the weighted sums, B T N (H + 1) words, in float32.

    Args:
      q: queries, laid out `P(None, None, "x", None)`, the same in every row of PEs; so is the
        result.
      cache: the keys and values; the attention runs on the wafer that it lives on.
      layer: which layer's, from 0.
      tables: the pages of each sequence.
      positions: where each token stands in its sequence; -1 for one whose result is 0.
      window: how many tokens a query sees, its own included; None: all before it.
      scale: what the products are multiplied by; by default `H ** -0.5`.
      sinks: for each head one more score that counts in the softmax's denominator only.

    Raises:
      ValueError: shapes do not fit the cache.
    """
    _check_tokens("paged_attention", cache, q, cache.heads, tables, positions)
    if sinks is not None and jnp.shape(sinks) != q.shape[2:3]:
        raise ValueError(
            f"paged_attention: sinks is {jnp.shape(sinks)}, it must be one for each of the "
            f"{q.shape[2]} heads of q"
        )
    plan = PagesPlan(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        group=cache.heads // (cache.kv_heads * cache.repeats),
        page_tokens=cache.page_tokens,
        rows=1 if cache.wafer is None else cache.wafer.height,
        on_wafer=cache.wafer is not None,
    )
    if sinks is None:
        sinks = jnp.full(q.shape[2], -jnp.inf, jnp.float32)
    tables = tables + jnp.asarray(layer, jnp.int32) * cache.pages
    if cache.wafer is None:
        return _attend(q, cache.arrays, tables, positions, sinks, plan)
    wafer, shape, heads = cache.wafer, q.shape, cache.k.shape[1] * plan.group
    q = layout.pad(layout.resize(q, 2, heads), TOKENS, wafer)
    sinks = layout.pad(layout.resize(sinks, 0, heads), P(COLS), wafer)
    specs = (TOKENS, _specs(cache), P(), P(), P(COLS))
    kernel = functools.partial(_attend, plan=plan)
    out = wafer.map(kernel, in_specs=specs, out_specs=TOKENS)(
        q, cache.arrays, tables, positions, sinks
    )
    return layout.crop(out, shape, TOKENS, wafer)


def add_halves(x: Float[Array, "*batch D"]) -> Float[Array, "*batch 1"]:
    """The sum of the last dimension, one half added to the other until one column is left.

    Its order does not depend on how many sums there are, as that of `jnp.sum` does on a CPU.
    """
    while (D := x.shape[-1]) > 1:
        half = D // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        x = jnp.concatenate([x, rest], axis=-1) if D % 2 else x
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagesPlan:
    """What every PE does."""

    scale: float
    window: int | None
    group: int  # query heads for each head of the cache
    page_tokens: int  # of all rows of PEs
    rows: int
    on_wafer: bool


def _specs(cache: KVPages) -> tuple[P, ...]:
    """The layout of each of the cache's arrays."""
    return (KEYS, VALUES, SCALES, SCALES)[: len(cache.arrays)]


def _write(
    pages: _Pages,
    new_k: Float[Array, "B T K H"],
    new_v: Float[Array, "B T K H"],
    tables: Int[Array, "B C"],
    positions: Int[Array, "B T"],
    base: Int[Array, ""],
    rows: int | None,
) -> _Pages:
    """The cache with new tokens; `rows` is the wafer's height, None on one device."""
    k, v, *scales = pages
    row: Int[Array, ""] | int = 0 if rows is None else fabric.axis_index(ROWS)
    rows = 1 if rows is None else rows
    S = k.shape[-1] * rows
    new_k, new_v = mark_not_finite(new_k, new_v)
    column = jnp.clip(positions // S, 0, tables.shape[1] - 1)
    page = jnp.take_along_axis(tables, column, axis=1) + base
    offset = positions % S
    # Token o of a page is entry o // rows of row o % rows. No page: it is not written here.
    mine = (positions >= 0) & (offset % rows == row)
    page = jnp.where(mine, page, k.shape[0]).reshape(-1)
    entry = (offset // rows).reshape(-1)
    new_k, new_v = (x.reshape(-1, *x.shape[2:]) for x in (new_k, new_v))  # [B T, K, H]
    if len(page) == 1:
        # XLA turns a scatter of a single entry into an update that copies the whole cache.
        page = jnp.append(page, k.shape[0])
        entry, new_k, new_v = (jnp.concatenate([x, x]) for x in (entry, new_k, new_v))
    if scales:
        (new_k, k_scale), (new_v, v_scale) = map(_round_heads, (new_k, new_v))
        new_scales = zip(scales, (k_scale, v_scale), strict=True)
        scales = [old.at[page, :, entry].set(new, mode="drop") for old, new in new_scales]
    k = k.at[page, :, :, entry].set(new_k.astype(k.dtype), mode="drop")
    return k, v.at[page, :, entry].set(new_v.astype(v.dtype), mode="drop"), *scales


def _round_heads(
    x: Float[Array, "tokens K H"],
) -> tuple[Float[Array, "tokens K H"], Float[Array, "tokens K"]]:
    """Whole numbers up to 127, and the scale of each head; NaN for a head that holds NaN."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    rounded = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return jnp.where(jnp.isnan(rounded), 0, rounded), scale


def _attend(
    q: Float[Array, "B T N H"],
    pages: _Pages,
    tables: Int[Array, "B C"],
    positions: Int[Array, "B T"],
    sinks: Float[Array, " N"],
    plan: PagesPlan,
) -> Float[Array, "B T N H"]:
    in_int8 = len(pages) > 2
    B, T, N, H = q.shape
    K, G = N // plan.group, plan.group
    # Tokens and heads that share keys are the rows of one product.
    rows = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    if T * G == 1:
        # XLA's CPU backend sums a product of one row in another order than one of several.
        rows = jnp.concatenate([rows, rows], axis=2)
    R = rows.shape[2]
    row = fabric.axis_index(ROWS) if plan.on_wafer else 0
    local = (jnp.arange(pages[0].shape[-1]) * plan.rows + row)[None, None, None]  # [1, 1, 1, S]
    query = jnp.repeat(positions, G, axis=1)[:, None]  # [B, 1, T G]
    query = query if R == T * G else jnp.concatenate([query, query], axis=2)

    def step(page: Int[Array, ""], carry: _Sums) -> _Sums:
        peak, total, out = carry
        ids = lax.dynamic_index_in_dim(tables, page, axis=1, keepdims=False)
        k, v, *of_tokens = (x.at[ids].get(mode="promise_in_bounds") for x in pages)
        keys, values = k.astype(q.dtype), v.astype(q.dtype)
        scores = _dot("bkrh,bkhs->bkrs", rows, keys) * plan.scale
        if in_int8:
            scores *= of_tokens[0][:, :, None]
        position = page * plan.page_tokens + local
        sees = position <= query[..., None]
        if plan.window is not None:
            sees &= position > query[..., None] - plan.window
        scores = jnp.where(sees, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        shrink, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak)
        total = total * shrink + weights
        weights = weights * of_tokens[1][:, :, None] if in_int8 else weights
        out = out * shrink + _dot("bkrs,bksh->bkrh", weights.astype(q.dtype), values)
        return new_peak, total, out

    # In a kernel, what a loop begins with must differ from PE to PE, as what it ends with does.
    varying = fabric.varying if plan.on_wafer else lambda x: x
    zeros = jnp.zeros((B, K, R, 1), jnp.float32)
    totals = jnp.zeros((B, K, R, len(local[0, 0, 0])), jnp.float32)  # of each place in a page
    sums = (zeros + LOWEST, totals, jnp.zeros((B, K, R, H), jnp.float32))
    count = jnp.max(positions) // plan.page_tokens + 1
    peak, total, out = lax.fori_loop(0, count, step, jax.tree.map(varying, sums))
    peak, total, out = (x[:, :, : T * G] for x in (peak, add_halves(total), out))
    # A sink is one more score, that of no value.
    sink = jnp.tile(sinks.astype(jnp.float32).reshape(1, K, G, 1), (1, 1, T, 1))
    highest = jnp.maximum(_reduce_rows(peak, "max", plan), sink)
    sums_of_row = jnp.concatenate([out, total], axis=-1) * jnp.exp(peak - highest)
    summed = _reduce_rows(sums_of_row, "sum", plan)
    total = summed[..., H:] + jnp.exp(sink - highest)
    # Not `total > 0`: a total that is NaN must give NaN.
    out = jnp.where(total == 0, 0, summed[..., :H] / jnp.where(total == 0, 1, total))
    return out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)


_Sums = tuple[Float[Array, "B K R 1"], Float[Array, "B K R S"], Float[Array, "B K R H"]]


def _reduce_rows(
    x: Float[Array, "*shape"], op: fabric.Op, plan: PagesPlan
) -> Float[Array, "*shape"]:
    return fabric.all_reduce(x, ROWS, op) if plan.on_wafer else x


def _dot(
    subscripts: str, a: Float[Array, "B K R _"], b: Shaped[Array, "B K _ _"]
) -> Float[Array, "B K R _"]:
    # XLA's CPU backend sums products of more rows in another order.
    tiles = [a[:, :, i : i + _MOST_ROWS] for i in range(0, a.shape[2], _MOST_ROWS)]
    products = [jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32) for a in tiles]
    return products[0] if len(products) == 1 else jnp.concatenate(products, axis=2)


def _zeros(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, spec: P, wafer: Wafer | None
) -> Shaped[Array, "..."]:
    """Zeros that are made where they live: whole, they might not fit one device."""
    if wafer is None:
        return jnp.zeros(shape, dtype)
    shape = layout.padded_shape(shape, spec, wafer)
    if wafer.backend == "virtual":
        return jnp.zeros(shape, dtype)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=wafer.sharding(spec))()


def _check_tokens(
    operation: str,
    cache: KVPages,
    x: Shaped[Array, "..."],
    heads: int,
    tables: Shaped[Array, "..."],
    positions: Shaped[Array, "..."],
) -> None:
    head_size = cache.k.shape[2]
    if x.ndim != 4 or x.shape[2:] != (heads, head_size) or not x.size:
        raise ValueError(
            f"{operation}: the tokens are {x.shape}, they must be [B, T, {heads}, {head_size}]: "
            "sequences, tokens, heads, head size"
        )
    if jnp.shape(positions) != x.shape[:2]:
        raise ValueError(
            f"{operation}: positions is {jnp.shape(positions)}, it must be {x.shape[:2]}: one for "
            "each token"
        )
    if jnp.ndim(tables) != 2 or len(tables) != len(x):
        raise ValueError(
            f"{operation}: tables is {jnp.shape(tables)}, it must be [{len(x)}, C]: the pages of "
            "each sequence"
        )
