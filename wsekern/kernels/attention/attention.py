"""Attention: the sequence lies along y, the heads along x, the batch over the wafers.

A. Vaswani et al., "Attention Is All You Need", 2017. Grouped queries: J. Ainslie et al., "GQA:
Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.attention import (
    gathered,
    head_groups,
    operands,
    plain,
    ring,
    tile,
    ulysses,
    vendor,
    zigzag,
)
from wsekern.kernels.attention.explain import explain
from wsekern.kernels.attention.implementation import Implementation
from wsekern.kernels.attention.mask import Keys, Rows
from wsekern.kernels.attention.operands import Floats, Segments
from wsekern.kernels.attention.plan import (
    REQUIREMENTS,
    Algorithm,
    AttentionOptions,
    AttentionPlan,
    fewest_blocks,
    plan_attention,
)
from wsekern.kernels.attention.tile_gradients import sink_gradient
from wsekern.wafer import context
from wsekern.wafer.axes import ROWS, WAFERS
from wsekern.wafer.explanation import explained_by
from wsekern.wafer.keywords import accept_jax_names
from wsekern.wafer.platforms import Platform, platforms_of
from wsekern.wafer.wafer import Wafer


@explained_by(explain)
@accept_jax_names("attention", REQUIREMENTS, is_causal="causal")
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    bias: Float[Array, "..."] | None = None,
    algorithm: Algorithm = "auto",
    implementation: Implementation = "auto",
    precision: lax.PrecisionLike = None,
    wafer: Wafer | None = None,
    is_causal: bool | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` over the keys that a query may see, for every head.

    B sequences of T queries and S keys; N heads of queries and K of keys and values, of size H.
    Query head n attends to key-value head n // (N / K). The softmax is in float32. A query that may
    see no key gets zeros. Gradients compute the scores again; reverse mode only.

    The algorithms, with what a PE receives on p PEs along y, and the steps that wait for one
    another. Q and KV are the words of its tile of queries, and of keys and values; a gradient that
    travels is in float32.

    - `ring`: keys and values travel round the PEs. (p-1) KV in p-1 steps; the gradient (2p-1) KV in
      p. A PE holds two of others' tiles at a time. With a window of W keys only the nearest n = 1 +
      ceil((W-1) / (S/p)) tiles travel: (n-1) KV in n-1 steps; the gradient (2n-1) KV in n. Causal
      attention of as many keys as queries, without window or bias, takes the ring in zig-zag
      order, which gives every PE the same work. Exchanging halves of tiles costs Q + KV/2 and two
      steps more; in the gradient 3Q/2 + KV, and half a word for each row and head.
    - `allgather`: every PE gathers all keys. (p-1) KV in one step, and p tiles held; the gradient
      gathers them again and sums each tile's gradient at its PE: 2(p-1) KV in two steps. A TPU
      takes p/2 and p-1, beside the computation, and if that pays causal rows in zig-zag order: Q
      and two steps more; in the gradient 3Q/2, and half a word for each row and head.
    - `ulysses`: an all-to-all gives every PE whole sequences of 1/p of its heads. (p-1)/p of 2Q +
      KV in two steps; the gradient (p-1)/p of 3Q + 2KV and a word for each row and head, in two.
      K must divide by the number of PEs.
    - `auto`: `allgather` while a PE has memory for it; else `ulysses` on devices if the heads
      divide and there is no bias; else `ring`. CPU devices take `ulysses` from 1 MiB of keys and
      values on, where it can be. `attention.explain` tells, with each one's cost.

    A PE's tiles are computed by a kernel for the platform that the program is compiled for: on a
    TPU by splash attention, from 128 rows a tile on, which in bfloat16 rounds the scaled keys and
    each tile's gradients; on a GPU in 16 bits by cuDNN where a row's keys make one tile, else by a
    Pallas kernel; else, and with a bias or a precision, by blocks in jnp. `explain` says which.

    Segment ids travel with their rows. Gradients of `sinks`, and of a `bias` that is the same along
    an axis, end with an all-reduce along it.

    Args:
      q: queries, laid out `P("wafer", "y", "x", None)`.
      k: keys, laid out likewise.
      v: values, laid out likewise; finite also where a mask hides them.
      causal: query t sees only keys 0 to t, counted from the start of both, also where T != S.
      window: how many keys a query sees, its own included: t-window+1 to t. Needs `causal`. Blocks
        that lie completely outside are skipped.
      scale: what the products are multiplied by; by default `H ** -0.5`.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, before bias and mask.
      sinks: one more score a head, not scaled or capped, in the softmax's denominator only.
      segment_ids: a query sees only keys of its own segment. One array for queries and keys, or a
        tuple of one for each.
      bias: added to the scores; broadcastable to `[B, N, T, S]`. A PE holds the rows and heads of
        it that are its own, and all columns. A score below -1e30 with its bias is not seen: -inf
        hides a key, for a whole row too.
      algorithm: "auto", "ring", "allgather" or "ulysses".
      implementation: of the tiles: "auto", "splash", "cudnn", "pallas", or "xla" for blocks in jnp.
        On a CPU, "splash" is interpreted, slowly.
      precision: of every product, forward and backward, as in `jax.lax.dot_general`.
      wafer: where to run; by default the current wafer. Without one a CPU takes
        `jax.nn.dot_product_attention`, or one PE's blocks in jnp where that means another thing or
        lacks an option: with a bias, sinks, a soft cap, a precision or two arrays of segment ids.
      is_causal: JAX's name for `causal`; give one of the two.

    Raises:
      ValueError: shapes do not fit one another, dtypes differ, `window` is below 1 or not causal,
        `soft_cap` is not positive, `algorithm` is unknown or cannot serve the grid,
        `implementation` is unknown or cannot serve the tiles, or `causal` and `is_causal` differ.
    """
    # fmt: off
    options = AttentionOptions(
        causal=causal, window=window, scale=scale, soft_cap=soft_cap, precision=precision,
        algorithm=algorithm, implementation=implementation,
    )
    # fmt: on
    floats, segments = operands.pack(q, k, v, bias, sinks, segment_ids)
    return _run(floats, segments, options, wafer)


def _run(
    floats: Floats, segments: Segments, options: AttentionOptions, wafer: Wafer | None
) -> Float[Array, "B T N H"]:
    platforms = platforms_of(wafer, floats.q)
    wafer = context.resolve(wafer)
    if len(platforms) == 1:
        return _on_platform(floats, segments, options, wafer, platforms[0])
    # Lowering knows the platform, and takes what was traced for it. Autodiff keeps the residuals of
    # all: none may be as large as all scores, as those of jax.nn's attention are.
    by_platform = dict.fromkeys(platforms, options)
    if options.implementation == "auto" and "cpu" in platforms:
        by_platform["cpu"] = dataclasses.replace(options, implementation="xla")
    runs: dict[str, Callable[..., Any]] = {}
    refusals = []
    for platform, asked in by_platform.items():
        try:
            plan_attention(floats, segments, asked, None, platform)
        except ValueError as error:
            refusals.append(error)
            continue
        run = functools.partial(_on_lowered, options=asked, platform=platform)
        runs["cuda" if platform == "gpu" else str(platform)] = run
    if not runs:
        raise refusals[0]
    ids = segments[:1] if segments.q is segments.k else segments
    return lax.platform_dependent(floats, *ids, **runs)


def _on_lowered(
    floats: Floats, *ids: Int[Array, "B _"] | None, options: AttentionOptions, platform: Platform
) -> Float[Array, "B T N H"]:
    return _on_platform(floats, Segments(ids[0], ids[-1]), options, None, platform)


def _on_platform(
    floats: Floats,
    segments: Segments,
    options: AttentionOptions,
    wafer: Wafer | None,
    platform: Platform,
) -> Float[Array, "B T N H"]:
    plan = plan_attention(floats, segments, options, wafer, platform).plan
    if wafer is None and plain.serves(floats, segments, options, plan):
        return plain.plain_attention(floats, segments.q, options, plan)
    shape = floats.q.shape
    padded = operands.pad(floats, segments, plan.sizes, plan.order, wafer)
    if plan.rule.implementation == "cudnn" and plan.order == "ulysses":
        # cuDNN's own gradient reads the log-sum-exps of its forward pass. Ours cannot see them, and
        # would run that again.
        out, _ = _forward(*padded, plan, wafer, for_gradients=False)
    else:
        out = _attention(*padded, plan, wafer)
    return operands.crop(out, shape, wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(
    floats: Floats, segments: Segments, plan: AttentionPlan, wafer: Wafer | None
) -> Float[Array, "B T N H"]:
    return _forward(floats, segments, plan, wafer, for_gradients=False)[0]


Lse = Float[Array, "_ _ _"] | None  # the rows' log-sum-exps, where the kernel gives them
Residuals = tuple[Floats, Segments, Float[Array, "B T N H"], Lse]


# Plain autodiff would keep every block of scores.
def _fwd(
    floats: Floats, segments: Segments, plan: AttentionPlan, wafer: Wafer | None
) -> tuple[Float[Array, "B T N H"], Residuals]:
    out, lse = _forward(floats, segments, plan, wafer, for_gradients=True)
    return out, (floats, segments, out, lse)


def _forward(
    floats: Floats,
    segments: Segments,
    plan: AttentionPlan,
    wafer: Wafer | None,
    *,
    for_gradients: bool,
) -> tuple[Float[Array, "B T N H"], Lse]:
    # The blocks in jnp give the log-sum-exps anyway: one program then serves both calls.
    with_lse = plan.gives_lse and (for_gradients or plan.rule.implementation == "xla")
    if wafer is None:
        return _local(floats, segments, plan, with_lse)
    kernel = functools.partial(_per_pe, plan=plan, with_lse=with_lse)
    specs = operands.specs(floats, segments, plan.order)
    result_specs = (operands.HEADS, operands.lse_spec(plan.order) if with_lse else None)
    run = wafer.map(
        kernel, in_specs=specs, out_specs=result_specs, replicated_by_construction=_opaque(plan)
    )
    return run(floats, segments)


def _opaque(plan: AttentionPlan) -> bool:
    """Whether JAX's check of replication cannot see through the kernel: Pallas lacks the types."""
    return plan.rule.implementation in ("splash", "pallas")


def _bwd(
    plan: AttentionPlan, wafer: Wafer | None, residuals: Residuals, dout: Float[Array, "B T N H"]
) -> tuple[Floats, None]:
    floats, segments, out, lse = residuals
    if wafer is None:
        return _local_gradients(floats, segments, out, lse, dout, plan), None
    kernel = functools.partial(_per_pe_gradients, plan=plan)
    float_specs, segment_specs = operands.specs(floats, segments, plan.order)
    lse_spec = None if lse is None else operands.lse_spec(plan.order)
    run = wafer.map(
        kernel,
        in_specs=(float_specs, segment_specs, operands.HEADS, lse_spec, operands.HEADS),
        out_specs=float_specs,
        replicated_by_construction=_opaque(plan),
    )
    return run(floats, segments, out, lse, dout), None


_attention.defvjp(_fwd, _bwd)


def _per_pe(
    floats: Floats, segments: Segments, plan: AttentionPlan, with_lse: bool
) -> tuple[Float[Array, "B Tt Nt H"], Lse]:
    run: Callable[..., Any]
    run = gathered.gathered_attention if plan.gathers_by_shifts else _group_per_pe
    run = functools.partial(run, segments=segments, plan=plan, with_lse=with_lse)
    outs, lses = zip(*head_groups.in_groups(run, floats, plan), strict=True)
    return head_groups.join_heads(outs), head_groups.join(lses, 1) if with_lse else None


def _group_per_pe(
    floats: Floats, segments: Segments, plan: AttentionPlan, with_lse: bool
) -> tuple[Float[Array, "B Tt Nt H"], Lse]:
    rows, keys = _start(floats, segments, plan)
    K, G = rows.q.shape[2:4]
    sinks = None if floats.sinks is None else floats.sinks.astype(jnp.float32).reshape(K, G)
    if plan.merges:
        if plan.order == "zigzag":
            running = zigzag.zigzag_attention(rows, keys, plan.rule)
        else:
            running = ring.ring_attention(rows, keys, plan.rule, plan.ring_tiles)
        result: tuple[Float[Array, "nq B K G c H"], Lse] = tile.finish(
            running, sinks, floats.q.dtype
        )
    else:
        needed = with_lse or not plan.rule.rows_see_keys
        kind = _tile_kind(plan)
        result = vendor.attend(rows, keys, plan.rule, kind, sinks, with_lse=needed)
    out, lse = result
    out = _restore_order(tile.unblock_queries(out), plan)
    if not with_lse:
        return out, None
    assert lse is not None
    n, B, K, G, c = lse.shape
    # The log-sum-exps stay in the algorithm's order: only the gradient reads them.
    return out, lse.transpose(1, 2, 3, 0, 4).reshape(B, K * G, n * c)


def _per_pe_gradients(
    floats: Floats,
    segments: Segments,
    out: Float[Array, "B Tt Nt H"],
    lse: Lse,
    dout: Float[Array, "B Tt Nt H"],
    plan: AttentionPlan,
) -> Floats:
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
    # Where memory is short, nothing of the gradient shall take room before the result is there.
    if plan.takes_turns and plan.merges:
        dout, delta = lax.optimization_barrier((dout, delta))
    elif plan.takes_turns:
        dout, lse = lax.optimization_barrier((dout, lse))
    run: Callable[..., Floats] = _group_gradients_per_pe
    if plan.gathers_by_shifts:
        run = gathered.gathered_gradients

    def run_group(floats: Floats, *for_gradients: Float[Array, "..."] | None) -> Floats:
        return run(floats, segments, *for_gradients, plan)

    groups = head_groups.in_groups(run_group, floats, plan, (lse, dout, delta))
    dq, dk, dv = (head_groups.join_heads([group[i] for group in groups]) for i in range(3))
    dbias = _bias_gradient(floats.bias, groups[0].bias, plan)
    if floats.sinks is None:
        return Floats(dq, dk, dv, dbias, None)
    dsinks = head_groups.join([group.sinks for group in groups], 0)
    along = {"local": (), "ulysses": (WAFERS,)}.get(plan.order, (WAFERS, ROWS))
    dsinks = _sum_along(dsinks, along).astype(floats.sinks.dtype)
    return Floats(dq, dk, dv, dbias, dsinks)


def _group_gradients_per_pe(
    floats: Floats,
    segments: Segments,
    lse: Lse,
    dout: Float[Array, "B Tt Nt H"],
    delta: Float[Array, "B Tt Nt"],
    plan: AttentionPlan,
) -> Floats:
    rows, keys = _start(floats, segments, plan, (lse, dout, delta))
    if plan.order == "zigzag":
        grads = zigzag.zigzag_gradients(rows, keys, plan.rule)
    elif plan.order == "ring":
        grads = ring.ring_gradients(rows, keys, plan.rule, plan.ring_tiles)
    else:
        grads = vendor.gradients(rows, keys, plan.rule, _tile_kind(plan))
    if isinstance(grads.dkv, tuple):
        dk, dv = grads.dkv[0]
        if plan.order == "allgather":
            dk, dv = _sum_at_home(dk), _sum_at_home(dv)
        dk, dv = dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    else:
        dkv = grads.dkv
        if plan.order == "allgather":
            dkv = tile.split_blocks(dkv, plan.k_blocks * fabric.axis_size(ROWS))
            dkv = fabric.reduce_scatter(dkv, ROWS)
        dk, dv = tile.unblock_keys(dkv if plan.key_scale != 1 else dkv.astype(floats.k.dtype))
    # What was scaled before the products has its gradient scaled after them.
    dq = vendor.gradient_of_queries(grads, plan.rule) * plan.query_scale
    dk = dk if plan.key_scale == 1 else dk.astype(jnp.float32) * plan.key_scale
    dq, dk, dv = (x.astype(floats.q.dtype) for x in (dq, dk, dv))
    tiles = _restore_order((tile.unblock_queries(dq), dk, dv), plan)
    dsinks = None if floats.sinks is None else sink_gradient(floats.sinks, rows)
    return Floats(*tiles, grads.dbias, dsinks)


# Without a wafer, outside jit, the kernel is one program, and not one for each operation.
_local = jax.jit(_per_pe, static_argnums=(2, 3), inline=True)
_local_gradients = jax.jit(_per_pe_gradients, static_argnums=5, inline=True)


def _start(
    floats: Floats,
    segments: Segments,
    plan: AttentionPlan,
    for_gradients: tuple[Lse, Float[Array, "B Tt Nt H"], Float[Array, "B Tt Nt"]] | None = None,
) -> tuple[Rows, Keys]:
    """This PE's rows and keys in blocks, after the moves that come before the first product.

    Args:
      floats: tiles.
      segments: tiles.
      plan: what to do.
      for_gradients: the rows' log-sum-exps `[B, N, T]`, already in the plan's order, then the
        gradient of the result, and its dot product with the result `[B, T, N]`, both not yet moved.
    """
    lse, dout, delta = for_gradients or (None, None, None)
    moved = (floats.q, floats.k, floats.v, dout, delta)  # one pytree: one step moves them all
    if plan.order == "zigzag":
        moved, segments = zigzag.to_zigzag((moved, segments))
    elif plan.order == "ulysses":
        moved = ulysses.split_heads(moved)
        segments = fabric.all_gather(segments, ROWS, 1)
    q, k, v, dout, delta = moved
    if plan.query_scale != 1:
        q = q * plan.query_scale
    if plan.key_scale != 1:
        k = k * plan.key_scale
    heads = k.shape[2]
    block = functools.partial(tile.block_queries, kv_heads=heads, blocks=plan.q_blocks)

    def block_rows(x: Float[Array, "B Tt Nt"] | None) -> Float[Array, "nq B K G c"] | None:
        return None if x is None else block(x[..., None])[..., 0]

    q = block(q)
    rows = Rows(
        q,
        tile.block_starts(q, fabric.axis_index(ROWS) if plan.starts_at_place else 0),
        operands.block_segments(segments.q, plan.q_blocks),
        operands.block_bias(floats.bias, heads, plan.q_blocks),
        None if dout is None else block(dout),
        block_rows(None if lse is None else lse.transpose(0, 2, 1)),
        block_rows(delta),
    )
    return rows, _start_keys(k, v, segments.k, plan)


def _start_keys(
    k: Float[Array, "B St Kt H"],
    v: Float[Array, "B St Kt H"],
    segments: Int[Array, "B St"] | None,
    plan: AttentionPlan,
) -> Keys:
    if plan.whole_tiles and not plan.merges:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if plan.order == "allgather":
            k, v = fabric.all_gather((k, v), ROWS, 2)
            segments = fabric.all_gather(segments, ROWS, 1)
        start = jnp.zeros(1, jnp.int32)
        return Keys(((k, v),), start, operands.block_segments(segments, 1))
    kv = tile.block_keys(k, v, plan.k_blocks)
    of_blocks = operands.block_segments(segments, plan.k_blocks)
    if plan.order == "allgather":
        kv, of_blocks = fabric.all_gather((kv, of_blocks), ROWS)
        kv, of_blocks = _merge_gathered(kv, of_blocks, plan.k_block)
    return Keys(kv, tile.block_starts(kv, 0), of_blocks)


def _restore_order(tiles: zigzag.Tree, plan: AttentionPlan) -> zigzag.Tree:
    """Tiles `[B, T, N, H]` in the layout of the operands again, after the moves of `_start`."""
    if plan.order == "zigzag":
        return zigzag.from_zigzag(tiles)
    return ulysses.split_sequence(tiles) if plan.order == "ulysses" else tiles


def _tile_kind(plan: AttentionPlan) -> vendor.TileKind:
    """The kind of the one tile that a PE meets when it has all keys at hand."""
    if not plan.rule.masks_positions:
        return "full"
    square = plan.sizes.queries == plan.sizes.keys and not plan.starts_at_place
    exact = square and plan.rule.window is None and plan.rule.keys is None
    return "diagonal" if exact else "any"


def _sum_at_home(x: Float[Array, "B K _ H"]) -> Float[Array, "B K s H"]:
    """The sum over PEs of the rows that this PE owns, in float32, where each PE has all rows."""
    if x.dtype == jnp.float32:
        return fabric.reduce_scatter(x, ROWS, 2)
    # A reduce-scatter would round each partial sum to 16 bits. The same bytes, summed afterwards.
    B, K, S, H = x.shape
    p = fabric.axis_size(ROWS)
    parts = x.reshape(B, K, p, S // p, H).transpose(2, 0, 1, 3, 4)
    return fabric.all_to_all(parts, ROWS, 0, 0).astype(jnp.float32).sum(0)


def _merge_gathered(
    kv: Float[Array, "nk 2 B K s H"], segments: Int[Array, "nk B s"] | None, longest: int
) -> tuple[Float[Array, "_ 2 B K _ H"], Int[Array, "_ B _"] | None]:
    """Gathered keys and values, and their segments, in as few blocks as `longest` allows."""
    blocks = fewest_blocks(kv.shape[0], kv.shape[0] * kv.shape[-2], longest)
    if segments is not None:
        segments = segments.reshape(blocks, -1, *segments.shape[1:]).swapaxes(1, 2)
        segments = segments.reshape(*segments.shape[:2], -1)
    return tile.merge_blocks(kv, blocks), segments


def _bias_gradient(
    bias: Float[Array, "_ _ _ _"] | None,
    dbias: Float[Array, "nq _ _ _ _ _"] | None,
    plan: AttentionPlan,
) -> Float[Array, "_ _ _ _"] | None:
    """The gradient of a PE's part of the bias, summed over the PEs that share the part."""
    if bias is None or dbias is None:
        return None
    dbias = operands.unblock_bias(dbias, bias.shape)
    return _sum_along(dbias, plan.bias_shared).astype(bias.dtype)


def _sum_along(x: Float[Array, "*shape"], axes: tuple[str, ...]) -> Float[Array, "*shape"]:
    return fabric.all_reduce(x, axes) if axes else x
