"""This file is attention: the sequence lies along y, the heads along x, the batch over the wafers.

A. Vaswani et al., "Attention Is All You Need", 2017. Grouped queries: J. Ainslie et al., "GQA:
Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import context, fabric, layout
from wsekern.axes import COLS, ROWS, WAFERS
from wsekern.kernels import allgather, ring
from wsekern.kernels import tile_attention as tile
from wsekern.wafer import Wafer

Algorithm = Literal["auto", "ring", "allgather"]

_HEADS = P(WAFERS, ROWS, COLS, None)  # [B, T, N, H]
_LSE = P(WAFERS, COLS, ROWS)  # [B, N, T]
_BLOCK = 512  # rows of a block inside a PE


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    algorithm: str
    rule: tile.Rule
    kv_heads: int  # of one PE
    q_blocks: int  # of one PE
    k_blocks: int


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    scale: float | None = None,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` over the keys, for every head.

    Head n of the queries attends to head n // (N / K) of keys and values. The softmax is in
    float32. `ring` passes tiles of keys and values round y: p - 1 steps on p PEs, two tiles held at
    a time. `allgather` gathers all keys and values along y at once: one step, p tiles held. The
    gradient recomputes the scores: the ring holds O(tile) for it too, the gather p tiles. Reverse
    mode only.

    Args:
      q: queries, laid out `P("wafer", "y", "x", None)`.
      k: keys, laid out likewise.
      v: values, laid out likewise.
      causal: whether query t sees only keys 0 to t (counted from the start of both, T != S too).
      scale: what the scores are multiplied by; by default `H ** -0.5`.
      algorithm: "ring", "allgather", or "auto": the gather while what it gathers on a PE is small,
        as for `matmul`.
      wafer: where to run; by default the current wafer, and the plain local operation without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ, or `algorithm` is unknown.
    """
    _check(q, k, v, algorithm)
    wafer = context.resolve(wafer)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if wafer is None:
        return _local(q, k, v, causal, scale)
    shape, (T, S) = q.shape, (q.shape[1], k.shape[1])
    q_blocks, q = _sequence_blocked(q, wafer)
    k_blocks, k = _sequence_blocked(k, wafer)
    _, v = _sequence_blocked(v, wafer)
    q, k, v = _heads_aligned(q, k, v, wafer)
    q, k, v = (layout.pad(x, _HEADS, wafer) for x in (q, k, v))
    # A causal query never sees what pads the keys, unless there are more queries than keys.
    masked = k.shape[1] > S and (not causal or T > S)
    plan = _Plan(
        algorithm=_chosen(algorithm, k, wafer),
        rule=tile.Rule(scale=scale, causal=causal, keys=S if masked else None),
        kv_heads=k.shape[2] // wafer.width,
        q_blocks=q_blocks,
        k_blocks=k_blocks,
    )
    return layout.crop(_attention(q, k, v, plan, wafer), shape, _HEADS, wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, plan, wafer):
    return _fwd(q, k, v, plan, wafer)[0]


# Plain autodiff would keep every block of scores.
def _fwd(q, k, v, plan, wafer):
    kernel = functools.partial(_per_pe, plan=plan)
    run = wafer.map(kernel, in_specs=_HEADS, out_specs=(_HEADS, _LSE))
    out, lse = run(q, k, v)
    return out, (q, k, v, out, lse)


def _bwd(plan, wafer, residuals, dout):
    kernel = functools.partial(_per_pe_gradients, plan=plan)
    in_specs = (_HEADS, _HEADS, _HEADS, _HEADS, _LSE, _HEADS)
    run = wafer.map(kernel, in_specs=in_specs, out_specs=_HEADS)
    return run(*residuals, dout)


_attention.defvjp(_fwd, _bwd)


def _per_pe(
    q: Float[Array, "B Tt Nt H"],
    k: Float[Array, "B St Kt H"],
    v: Float[Array, "B St Kt H"],
    plan: _Plan,
) -> tuple[Float[Array, "B Tt Nt H"], Float[Array, "B Nt Tt"]]:
    q = tile.blocked_queries(q, plan.kv_heads, plan.q_blocks)
    kv = tile.blocked_keys(k, v, plan.k_blocks)
    if plan.algorithm == "ring":
        out, lse = tile.finish(ring.ring_attention(q, kv, plan.rule), q.dtype)
    else:
        out, lse = _gathered_attention(q, kv, plan.rule)
    n, B, K, G, c = lse.shape
    return tile.unblocked_queries(out), lse.transpose(1, 2, 3, 0, 4).reshape(B, K * G, n * c)


def _per_pe_gradients(
    q: Float[Array, "B Tt Nt H"],
    k: Float[Array, "B St Kt H"],
    v: Float[Array, "B St Kt H"],
    out: Float[Array, "B Tt Nt H"],
    lse: Float[Array, "B Nt Tt"],
    dout: Float[Array, "B Tt Nt H"],
    plan: _Plan,
) -> tuple[Float[Array, "B Tt Nt H"], Float[Array, "B St Kt H"], Float[Array, "B St Kt H"]]:
    blocked = functools.partial(tile.blocked_queries, kv_heads=plan.kv_heads, blocks=plan.q_blocks)
    dot = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1, keepdims=True)
    lse = lse.transpose(0, 2, 1)[..., None]
    rows = (blocked(q), blocked(dout), blocked(lse)[..., 0], blocked(dot)[..., 0])
    kv = tile.blocked_keys(k, v, plan.k_blocks)
    if plan.algorithm == "ring":
        dq, dkv = ring.ring_gradients(rows, kv, plan.rule)
    else:
        dq, dkv = _gathered_gradients(rows, kv, plan.rule)
    dk, dv = tile.unblocked_keys(dkv.astype(k.dtype))
    dq = dq.astype(q.dtype).transpose(0, 1, 2, 4, 5, 3)
    return tile.unblocked_queries(dq), dk, dv


def _gathered_attention(q, kv, rule):
    kv = _joined(fabric.all_gather(kv, ROWS))
    q_starts, k_starts = ring.starts(q, fabric.axis_index(ROWS)), ring.starts(kv, 0)
    if len(q) == len(kv) == 1:
        out, lse = tile.whole(q[0], kv[0], q_starts[0], 0, rule)
        return out[None], lse[None]
    running = tile.absorb(tile.nothing_yet(q), q, kv, q_starts, k_starts, rule)
    return tile.finish(running, q.dtype)


def _gathered_gradients(rows, kv, rule):
    kv = fabric.all_gather(kv, ROWS)
    blocks, kv = len(kv), _joined(kv)
    q_starts, k_starts = ring.starts(rows[0], fabric.axis_index(ROWS)), ring.starts(kv, 0)
    if len(rows[0]) == len(kv) == 1:
        row, q_start = jax.tree.map(lambda x: x[0], (rows, q_starts))
        dq, dkv = tile.gradients_of_block(row, kv[0], q_start, 0, rule)
        dq, dkv = dq[None], dkv[None]
    else:
        dq, dkv = ring.no_gradients(rows[0], kv)
        dq, dkv = tile.gradients(dq, dkv, rows, kv, q_starts, k_starts, rule)
    return dq, fabric.reduce_scatter(tile.parted(dkv, blocks), ROWS)


def _joined(kv):
    n, c = kv.shape[0], kv.shape[-2]
    return tile.joined(
        kv, min(m for m in range(1, n + 1) if n % m == 0 and n // m * c <= max(c, _BLOCK))
    )


def _local(q, k, v, causal, scale):
    # jax.nn takes cuDNN's kernel only when told to.
    served = (
        jax.default_backend() == "gpu"
        and q.dtype in (jnp.float16, jnp.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and (q.shape[1] == k.shape[1] or not causal)
    )
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, implementation="cudnn" if served else None
    )


def _heads_aligned(q, k, v, wafer):
    """q, k and v with heads such that each PE along x has those of k and v that its own need.

    Heads of k and v are repeated only as often as that takes; heads of zeros fill what is left.
    """
    K, group = k.shape[2], q.shape[2] // k.shape[2]

    def of_one_pe(repeats):
        return -(-K * repeats // wafer.width) * (group // repeats)

    repeats = min((r for r in range(1, group + 1) if group % r == 0), key=of_one_pe)
    kv_heads = -(-K * repeats // wafer.width) * wafer.width
    if repeats > 1:  # of whole heads: Explicit axes would not repeat what is split
        k, v = (layout.pad(x, P(WAFERS, ROWS, None, None), wafer) for x in (k, v))
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        q = layout.pad(q, P(WAFERS, ROWS, None, None), wafer)
    k, v = (_grown(x, 2, kv_heads) for x in (k, v))
    return _grown(q, 2, kv_heads * (group // repeats)), k, v


def _sequence_blocked(x, wafer):
    """How many blocks a PE's part of the sequence has, and `x` padded to have equal ones."""
    rows = -(-x.shape[1] // wafer.height)
    blocks = -(-rows // _BLOCK)
    return blocks, _grown(x, 1, wafer.height * blocks * -(-rows // blocks))


def _grown(x, axis, length):
    if x.shape[axis] == length:
        return x
    return jnp.pad(x, [(0, length - n if d == axis else 0) for d, n in enumerate(x.shape)])


def _chosen(algorithm, k, wafer):
    if algorithm != "auto":
        return algorithm
    pes = math.prod(wafer.axis_size(axis) for axis in (WAFERS, COLS))
    gathered = 2 * k.size * k.dtype.itemsize // pes
    return "allgather" if allgather.fits(gathered, wafer) else "ring"


def _check(q, k, v, algorithm):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} is {x.shape}, it must have four dimensions: batch, sequence, "
                "heads, head size"
            )
    if k.shape != v.shape:
        raise ValueError(f"attention: k is {k.shape} and v is {v.shape}: they must be alike")
    for axis, what in ((0, "batches"), (3, "head sizes")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(
                f"attention: q is {q.shape} and k is {k.shape}: their {what} "
                f"({q.shape[axis]} and {k.shape[axis]}) must be equal"
            )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention: q is {q.shape} and k is {k.shape}: neither may be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q has {q.shape[2]} heads and k has {k.shape[2]}: those of q must be a "
            "multiple of those of k"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q is {q.dtype}, k is {k.dtype} and v is {v.dtype}: cast them to one dtype"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q, k and v are {q.dtype}; cast them to a floating dtype")
    if algorithm not in ("auto", "ring", "allgather"):
        raise ValueError(
            f"attention: algorithm={algorithm!r} is not one of 'auto', 'ring', 'allgather'"
        )
