"""This file is attention: the sequence lies along y, the heads along x, the batch over the wafers.

A. Vaswani et al., "Attention Is All You Need", 2017. Grouped queries: J. Ainslie et al., "GQA:
Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.

What a PE receives, on p PEs along y, in its tile's words of queries Q and of keys and values KV
(a gradient that travels is in float32), and the steps that wait for one another:

- `ring`: (p-1) KV in p-1 steps; the gradient (2p-1) KV in p. Two tiles of keys are held at a time.
  Causal, and as many keys as queries, without window or bias: in zig-zag order, so that every PE
  has the same work. That relayout is 2Q + KV (of two PEs half of it) and two steps more; of the
  gradient 3Q + 2KV, two words a row and head, and two steps. A window of W keys needs the n = 1 +
  ceil((W-1) / (S/p)) nearest tiles alone: (n-1) KV in n-1 steps; the gradient (2n-1) KV in n.
- `allgather`: (p-1) KV in one step, p tiles of keys held; the gradient gathers them again and sums
  what belongs to each: 2(p-1) KV in two.
- `ulysses`: (p-1)/p of 2Q + KV in two steps, the sequence whole and 1/p of the heads; the gradient
  (p-1)/p of 3Q + 2KV and a word a row and head, in two.

Segment ids travel with the rows that they belong to.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.attention import operands, ring, tile, ulysses, vendor, zigzag
from wsekern.kernels.attention.mask import Keys, Rows
from wsekern.kernels.attention.operands import Floats, Segments
from wsekern.kernels.attention.plan import (
    Algorithm,
    AttentionOptions,
    AttentionPlan,
    fewest,
    plan_attention,
)
from wsekern.wafer import context, layout
from wsekern.wafer.axes import ROWS, WAFERS
from wsekern.wafer.wafer import Wafer


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
    bias: Float[Array, ...] | None = None,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` over the keys that a query may see, for every head.

    Head n of the queries attends to head n // (N / K) of keys and values. The softmax is in
    float32. A query that may see no key gets zeros. Gradients recompute the scores; reverse mode
    only. What each algorithm costs a PE stands at the head of this file; the gradients of `sinks`,
    and of a `bias` that is the same along an axis, end with an all-reduce along it.

    Args:
      q: queries, laid out `P("wafer", "y", "x", None)`.
      k: keys, laid out likewise.
      v: values, laid out likewise.
      causal: whether query t sees only keys 0 to t (counted from the start of both, T != S too).
      window: how many keys a query sees, its own with them: t-window+1 to t. Needs `causal`. What
        lies wholly outside is not visited.
      scale: what the scores are multiplied by; by default `H ** -0.5`.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`, before bias and mask.
      sinks: one more score for each head, neither scaled nor capped, that counts in the
        denominator alone.
      segment_ids: a query sees only keys of its own segment; one array for queries and keys, or one
        for each.
      bias: added to the scores; broadcastable to `[B, N, T, S]`. A PE holds its rows and heads of
        it, and all its columns. What is below -1e30 in sum is not seen.
      algorithm: "ring", "allgather", "ulysses", or "auto", whose choice `attention.explain` tells.
      wafer: where to run; by default the current wafer, and the plain local operation without one:
        `jax.nn.dot_product_attention`, which of a row whose biases are all -inf makes NaN. With
        sinks, a soft cap or two arrays of segment ids it is the blocked kernel of one PE.

    Raises:
      ValueError: shapes do not fit one another, dtypes differ, `window` is below 1 or not causal,
        `soft_cap` is not positive, or `algorithm` is unknown or cannot serve the grid.
    """
    options = AttentionOptions(
        causal=causal, window=window, scale=scale, soft_cap=soft_cap, algorithm=algorithm
    )
    floats, segments = operands.checked(q, k, v, bias, sinks, segment_ids, options)
    wafer = context.resolve(wafer)
    if wafer is None and soft_cap is None and sinks is None and not isinstance(segment_ids, tuple):
        return _plain(floats, segments.q, options)
    plan, _ = plan_attention(floats, segments, options, wafer)
    if wafer is None:
        return _attention(floats, segments, plan, None)
    padded = operands.padded(floats, segments, plan, wafer)
    out = _attention(*padded, plan, wafer)
    return layout.crop(out, q.shape, operands.HEADS, wafer)


def explain(q: Any, k: Any, v: Any, *, wafer: Wafer | None = None, **options) -> str:
    """Which algorithm `attention` of the same arguments takes, and why; nothing is computed.

    Args:
      q: queries, or their `jax.ShapeDtypeStruct`; k and v likewise.
      k: keys.
      v: values.
      wafer: as for `attention`.
      options: the others of `attention`.
    """
    bias, sinks, ids = (options.pop(name, None) for name in ("bias", "sinks", "segment_ids"))
    chosen = AttentionOptions(**options)
    floats, segments = operands.checked(q, k, v, bias, sinks, ids, chosen)
    wafer = context.resolve(wafer)
    if wafer is None:
        return "local: there is one PE, or no wafer"
    plan, why = plan_attention(floats, segments, chosen, wafer)
    return f"{plan.order}: {why}"


attention.explain = explain  # type: ignore[attr-defined]


def _plain(floats: Floats, segments: jax.Array | None, options: AttentionOptions) -> jax.Array:
    q, k, v, bias, _ = floats
    # jax.nn takes cuDNN's kernel only when told to.
    served = (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.float16, jnp.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and (q.shape[1] == k.shape[1] or not options.causal)
        and bias is None
        and segments is None
    )
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        mask,
        is_causal=options.causal,
        scale=options.scale,
        local_window_size=None if options.window is None else (options.window - 1, 0),
        implementation="cudnn" if served else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(
    floats: Floats, segments: Segments, plan: AttentionPlan, wafer: Wafer | None
) -> jax.Array:
    return _fwd(floats, segments, plan, wafer)[0]


# Plain autodiff would keep every block of scores.
def _fwd(floats, segments, plan, wafer):
    kernel = functools.partial(_per_pe, plan=plan)
    specs = operands.specs(floats, segments, plan)
    of_results = (operands.HEADS, operands.lse_spec(plan))
    run = kernel if wafer is None else wafer.map(
        kernel, in_specs=specs, out_specs=of_results
    )  # fmt: skip
    out, lse = run(floats, segments)
    return out, (floats, segments, out, lse)


def _bwd(plan, wafer, residuals, dout):
    floats, segments, out, lse = residuals
    kernel = functools.partial(_per_pe_gradients, plan=plan)
    of_floats, of_segments = operands.specs(floats, segments, plan)
    rows = (operands.HEADS, operands.lse_spec(plan), operands.HEADS)
    run = kernel if wafer is None else wafer.map(
        kernel, in_specs=(of_floats, of_segments, *rows), out_specs=of_floats
    )  # fmt: skip
    return run(floats, segments, out, lse, dout), None


_attention.defvjp(_fwd, _bwd)


def _per_pe(
    floats: Floats, segments: Segments, plan: AttentionPlan
) -> tuple[Float[Array, "B Tt Nt H"], Float[Array, "_ _ _"]]:
    rows, keys = _blocked(floats, segments, plan)
    if plan.order == "zigzag":
        running = zigzag.zigzag_attention(rows, keys, plan.rule)
    elif plan.order == "ring":
        running = ring.ring_attention(rows, keys, plan.rule, plan.tiles)
    else:
        running = vendor.absorb(None, rows, keys, plan.rule, _kind(plan))
    K, G = rows.q.shape[2:4]
    sinks = None if floats.sinks is None else floats.sinks.astype(jnp.float32).reshape(K, G)
    out, lse = tile.finish(running, sinks, floats.q.dtype)
    n, B, K, G, c = lse.shape
    out, lse = tile.unblocked_queries(out), lse.transpose(1, 2, 3, 0, 4).reshape(B, K * G, n * c)
    if plan.order == "zigzag":
        out = zigzag.in_order(out)
    elif plan.order == "ulysses":
        out = ulysses.by_sequence(out)
    return out, lse


def _per_pe_gradients(
    floats: Floats,
    segments: Segments,
    out: Float[Array, "B Tt Nt H"],
    lse: Float[Array, "_ _ _"],
    dout: Float[Array, "B Tt Nt H"],
    plan: AttentionPlan,
) -> Floats:
    dot = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1)
    rows, keys = _blocked(floats, segments, plan, (lse, dout, dot))
    if plan.order == "zigzag":
        grads = zigzag.zigzag_gradients(rows, keys, plan.rule)
    elif plan.order == "ring":
        grads = ring.ring_gradients(rows, keys, plan.rule, plan.tiles)
    else:
        kind = _kind(plan) if floats.sinks is None else "any"  # whose sum the tile does not know
        grads = vendor.gradients(rows, keys, plan.rule, kind)
    dkv = grads.dkv
    if plan.order == "allgather":
        dkv = fabric.reduce_scatter(tile.parted(dkv, plan.k_blocks * fabric.axis_size(ROWS)), ROWS)
    dk, dv = tile.unblocked_keys(dkv.astype(floats.k.dtype))
    dq = (grads.dq * plan.folded).astype(floats.q.dtype).transpose(0, 1, 2, 4, 5, 3)
    tiles = tile.unblocked_queries(dq), dk, dv
    if plan.order == "zigzag":
        tiles = zigzag.in_order(tiles)
    elif plan.order == "ulysses":
        tiles = ulysses.by_sequence(tiles)
    return Floats(
        *tiles, _bias_gradient(floats.bias, grads.dbias, plan), _sink_gradient(floats, rows, plan)
    )


def _blocked(
    floats: Floats, segments: Segments, plan: AttentionPlan, of_rows: tuple | None = None
) -> tuple[Rows, Keys]:
    """What this PE begins with, in the plan's order, in blocks.

    Args:
      floats: tiles.
      segments: tiles.
      plan: what to do.
      of_rows: for gradients: log-sum-exps, already in order, the result's gradient, and the dot
        product of the two.
    """
    lse, dout, dot = of_rows or (None, None, None)
    moved = (floats.q, floats.k, floats.v, dout, dot)
    if plan.order == "zigzag":
        moved, segments = zigzag.dealt((moved, segments))
    elif plan.order == "ulysses":
        moved = ulysses.by_heads(moved)
        segments = fabric.all_gather(segments, ROWS, 1)
    q, k, v, dout, dot = moved
    if plan.folded != 1:
        q = q * plan.folded
    kv = tile.blocked_keys(k, v, plan.k_blocks)
    k_segments = operands.blocked_segments(segments.k, plan.k_blocks)
    if plan.order == "allgather":
        kv, k_segments = fabric.all_gather((kv, k_segments), ROWS)
        kv, k_segments = _fewer(kv, k_segments, plan.k_block)
    heads = kv.shape[3]
    blocked = functools.partial(tile.blocked_queries, kv_heads=heads, blocks=plan.q_blocks)
    of_row = lambda x: None if x is None else blocked(x[..., None])[..., 0]  # noqa: E731
    q = blocked(q)
    rows = Rows(
        q,
        tile.starts(q, fabric.axis_index(ROWS) if plan.offset else 0),
        operands.blocked_segments(segments.q, plan.q_blocks),
        operands.blocked_bias(floats.bias, heads, plan.q_blocks),
        None if dout is None else blocked(dout),
        of_row(None if lse is None else lse.transpose(0, 2, 1)),
        of_row(dot),
    )
    return rows, Keys(kv, tile.starts(kv, 0), k_segments)


def _kind(plan: AttentionPlan) -> vendor.Kind:
    """What the one tile of a PE is that has all keys at hand."""
    if not plan.rule.bounded:
        return "full"
    square = plan.rows == plan.columns and not plan.offset
    exact = square and plan.rule.window is None and plan.rule.keys is None
    return "diagonal" if exact else "any"


def _fewer(kv, segments, block):
    """Gathered keys and values, and their segments, in as few blocks as there may be."""
    blocks = fewest(kv.shape[0], kv.shape[0] * kv.shape[-2], block)
    if segments is not None:
        segments = segments.reshape(blocks, -1, *segments.shape[1:]).swapaxes(1, 2)
        segments = segments.reshape(*segments.shape[:2], -1)
    return tile.joined(kv, blocks), segments


def _bias_gradient(bias, dbias, plan):
    """What a PE has of the bias' gradient, in the bias' own shape, summed where PEs share it."""
    if bias is None:
        return None
    dbias = operands.unblocked_bias(dbias, bias.shape)
    return _summed(dbias, plan.bias_shared).astype(bias.dtype)


def _sink_gradient(floats, rows, plan):
    if floats.sinks is None:
        return None
    K, G = rows.q.shape[2:4]
    sinks = floats.sinks.astype(jnp.float32).reshape(1, 1, K, G, 1)
    shares = jnp.exp(jnp.broadcast_to(sinks, rows.lse.shape) - rows.lse)
    dsinks = -jnp.sum(shares * rows.dot, (0, 1, 4)).reshape(K * G)
    along = {"local": (), "ulysses": (WAFERS,)}.get(plan.order, (WAFERS, ROWS))
    return _summed(dsinks, along).astype(floats.sinks.dtype)


def _summed(x, along):
    return fabric.all_reduce(x, along) if along else x
