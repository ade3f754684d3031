"""Attention on a TPU whose keys are gathered along y, with transfers that run beside the kernels.

Public per-PE functions. A TPU's compiler waits for an all-gather or an all-to-all, but not for
moves: they begin and end, and what does not need them runs in between. So keys are gathered by
shifts. Of several groups of heads, one's keys then travel while another is computed.

Causal rows may come in zig-zag order, as `plan.balanced` says: in the order of the sequence, the
last PE would compute (2p-1)/p times as much as each of p PEs does then.
"""

from __future__ import annotations

from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.attention import operands, tile, vendor, zigzag
from wsekern.kernels.attention.mask import Keys, Rows
from wsekern.kernels.attention.operands import Floats, Segments
from wsekern.kernels.attention.plan import AttentionPlan
from wsekern.kernels.attention.tile_gradients import sink_gradient
from wsekern.wafer.axes import ROWS

MaybeTile = TypeVar("MaybeTile", Array, Array | None)


def gathered_attention(
    floats: Floats, segments: Segments, plan: AttentionPlan, *, with_lse: bool
) -> tuple[Float[Array, "B Tt Nt H"], Float[Array, "B Nt Tt"] | None]:
    """The result, and if asked for the log-sum-exp of each row's scores.

    The log-sum-exps stay in the order of the rows that is computed in.
    """
    of_rows, of_keys = _segments(segments, plan)
    rows = _rows(floats, of_rows, plan)
    keys = _gather_keys(floats, of_keys, plan)
    K, G = rows.q.shape[2:4]
    sinks = None if floats.sinks is None else floats.sinks.astype(jnp.float32).reshape(K, G)
    needed = with_lse or not plan.rule.rows_see_keys
    out, lse = vendor.attend(rows, keys, plan.rule, _kind(plan), sinks, with_lse=needed)
    out = tile.unblock_queries(_exchange(out, plan, -2))
    if not with_lse:
        return out, None
    assert lse is not None
    return out, lse.reshape(out.shape[0], out.shape[2], out.shape[1])


def gathered_gradients(
    floats: Floats,
    segments: Segments,
    lse: Float[Array, "B Nt Tt"],
    dout: Float[Array, "B Tt Nt H"],
    delta: Float[Array, "B Tt Nt"],
    plan: AttentionPlan,
) -> Floats:
    """The gradients of all operands, that of the sinks in float32 and for these rows alone.

    Args:
      floats: tiles.
      segments: tiles.
      lse: the log-sum-exps, in the order of the rows that is computed in.
      dout: the gradient of the result, in the sequence's order.
      delta: its dot product with the result.
      plan: what to do.
    """
    of_rows, of_keys = _segments(segments, plan)
    rows = _rows(floats, of_rows, plan, (lse, dout, delta))
    keys = _gather_keys(floats, of_keys, plan)
    grads = vendor.gradients(rows, keys, plan.rule, _kind(plan))
    dq = tile.unblock_queries(_exchange(grads.dq, plan, -2))
    dk, dv = (_sum_at_home(x) for x in grads.dkv[0])
    # The keys were scaled before the products, so their gradient is scaled after them.
    dk, dv = (x.astype(floats.k.dtype).swapaxes(1, 2) for x in (dk * plan.key_scale, dv))
    dsinks = None if floats.sinks is None else sink_gradient(floats.sinks, rows)
    return Floats(dq, dk, dv, None, dsinks)


def _segments(
    segments: Segments, plan: AttentionPlan
) -> tuple[Int[Array, "1 B Tt"] | None, Int[Array, "1 B S"] | None]:
    of_rows = _exchange(operands.block_segments(segments.q, 1), plan, -1)
    return of_rows, operands.block_segments(fabric.all_gather(segments.k, ROWS, 1), 1)


def _rows(
    floats: Floats,
    segments: Int[Array, "1 B Tt"] | None,
    plan: AttentionPlan,
    for_gradients: tuple[Float[Array, "..."], ...] = (),
) -> Rows:
    """This PE's rows in the order to compute in.

    Args:
      floats: tiles.
      segments: of the rows, in that order.
      plan: what to do.
      for_gradients: the log-sum-exps `[B, N, T]`, in that order, then the gradient of the result
        `[B, T, N, H]` and its dot product with the result `[B, T, N]`, in the sequence's.
    """
    K = floats.k.shape[2]
    q = _exchange(tile.block_queries(floats.q, K, 1), plan, -2)
    length = q.shape[-2]
    in_order = tile.block_starts(q, fabric.axis_index(ROWS))
    rows = Rows(q, zigzag.starts(length) if plan.balanced else in_order, segments)
    if not for_gradients:
        return rows
    lse, dout, delta = for_gradients
    delta = tile.block_queries(delta[..., None], K, 1)[..., 0]
    return rows._replace(
        lse=lse.reshape(q.shape[:-1]),
        dout=_exchange(tile.block_queries(dout, K, 1), plan, -2),
        delta=_exchange(delta, plan, -1),
    )


def _gather_keys(floats: Floats, segments: Int[Array, "1 B S"] | None, plan: AttentionPlan) -> Keys:
    k, v = (x.swapaxes(1, 2) for x in (floats.k * plan.key_scale, floats.v))
    return Keys((fabric.ring_all_gather((k, v), ROWS, 2),), jnp.zeros(1, jnp.int32), segments)


def _kind(plan: AttentionPlan) -> vendor.TileKind:
    return "any" if plan.rule.masks_positions else "full"


def _exchange(x: MaybeTile, plan: AttentionPlan, axis: int) -> MaybeTile:
    return zigzag.exchange(x, axis) if plan.balanced else x


def _sum_at_home(x: Float[Array, "B K _ H"]) -> Float[Array, "B K s H"]:
    """The sum over PEs of the rows that this PE owns, in float32, where each PE has all rows."""
    p, place = fabric.axis_size(ROWS), fabric.axis_index(ROWS)
    length = x.shape[2] // p

    def part(owner: Int[Array, ""]) -> Float[Array, "B K s H"]:
        return lax.dynamic_slice_in_dim(x, owner * length, length, 2)

    sums = part(place).astype(jnp.float32)
    for distance in range(1, p):
        received = fabric.shift(part((place + distance) % p), ROWS, distance)
        sums += received.astype(jnp.float32)
    return sums
