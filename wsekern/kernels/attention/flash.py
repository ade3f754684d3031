"""Tiles of attention by a Pallas kernel for GPUs, which Triton compiles.

Public per-PE functions, without communication. T. Dao, "FlashAttention-2: Faster Attention with
Better Parallelism and Work Partitioning", 2023. The kernel takes any tile: where its rows and keys
lie in the sequence is an operand, so one program serves every PE and every step of a ring, and a
loop over blocks of keys runs only over those that are seen. On a CPU it is interpreted, slowly.

Queries are one block `[1, B, K, G, T, H]` and keys one block `[1, 2, B, K, S, H]`, as in `tile`.
Inside a kernel, scores are taken to the base 2, whose exponential is an instruction of the GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from wsekern.kernels.attention.mask import LOWEST, Keys, KeysAndValues, Rows, Rule
from wsekern.kernels.attention.operands import Described

Spec = tuple[Any, Any]  # an array, and the part of it that a program gets
Slice = Any  # of rows or keys, as Pallas takes it
Ref = Any  # a reference to an array in the GPU's memory, inside a kernel
Segments = tuple[Int[Array, " c"], Int[Array, " s"]]  # of a block's rows and keys

_LOG2_E = math.log2(math.e)
_ROWS, _KEYS = 128, 64  # of a block, for the result
_GRADIENT_ROWS, _GRADIENT_KEYS = 64, 64


def attend(
    rows: Rows, keys: Keys, rule: Rule, *, with_lse: bool
) -> tuple[Float[Array, "1 B K G c H"], Float[Array, "1 B K G c"] | None]:
    """A tile's normalized result, and the log-sum-exp of each row's scores in float32.

    A row that sees no key has a result of 0, and a log-sum-exp of -inf.

    Args:
      rows: one block of queries.
      keys: one block of keys.
      rule: how they are scored.
      with_lse: whether the log-sum-exps are returned.
    """
    call = _Call.of(rows, keys, rule)
    B, K, G, T, H = call.q.shape
    out, lse = call.run(
        functools.partial(_result_kernel, tile=call.tile(_ROWS, _KEYS)),
        grid=(T // _ROWS, K * G, B),
        inputs=[call.rows_of_block(call.q, _ROWS), *call.all_keys()],
        segments=call.segments,
        outputs=[
            call.rows_of_block(call.q, _ROWS),
            call.rows_of_block(jax.ShapeDtypeStruct((B, K, G, T), jnp.float32), _ROWS),
        ],
        warps=8 if H > 64 else 4,
    )
    out = out[..., : rows.q.shape[-1]][None]
    return out, lse[None] if with_lse else None


def gradients(
    rows: Rows, keys: Keys, rule: Rule
) -> tuple[Float[Array, "1 B K G c H"], KeysAndValues]:
    """What one tile of queries and one of keys add to the gradients, rounded to their dtype.

    The rows' log-sum-exps and deltas are those over all their keys, in this tile and in others.
    """
    assert rows.dout is not None and rows.lse is not None and rows.delta is not None
    call = _Call.of(rows, keys, rule)
    B, K, G, T, H = call.q.shape
    S = call.k.shape[2]
    # A row that sees no key has -inf. Against +inf all its weights are 0.
    lse = jnp.where(rows.lse == -jnp.inf, jnp.inf, rows.lse)[0] * _LOG2_E
    operands = call.q, _pad_heads(rows.dout[0]), lse, rows.delta[0]
    block, step = _GRADIENT_ROWS, _GRADIENT_KEYS
    [dq] = call.run(
        functools.partial(_queries_kernel, tile=call.tile(block, step)),
        grid=(T // block, K * G, B),
        inputs=[*(call.rows_of_block(x, block) for x in operands), *call.all_keys()],
        segments=call.segments,
        outputs=[call.rows_of_block(call.q, block)],
        warps=4,
    )
    dk, dv = call.run(
        functools.partial(_keys_kernel, tile=call.tile(block, step)),
        grid=(S // step, K, B),
        inputs=[*map(call.rows_of_head, operands), *call.keys_of_block(step)],
        segments=call.segments,
        outputs=call.keys_of_block(step),
        warps=4,
    )
    size = rows.q.shape[-1]
    return dq[None, ..., :size], (dk[..., :size], dv[..., :size])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """What is known of a tile when its kernel is compiled."""

    rows: int  # of a block
    keys: int
    q_blocks: int
    k_blocks: int
    scale: float
    soft_cap: float | None
    causal: bool
    window: int | None
    limited: bool  # some keys are padding
    segmented: bool

    def scores(
        self, products: Float[Array, "c s"]
    ) -> tuple[Float[Array, "c s"], Float[Array, "c s"] | None]:
        """Scores to the base 2, and the slope of the soft cap or None."""
        if self.soft_cap is None:
            return products * (self.scale * _LOG2_E), None
        capped = jnp.tanh(products * (self.scale / self.soft_cap))
        return capped * (self.soft_cap * _LOG2_E), 1 - capped * capped

    def hide(
        self,
        scores: Float[Array, "c s"],
        rows: Int[Array, " c"],
        keys: Int[Array, " s"],
        limit: Int[Array, ""],
        segments: Segments | None,
    ) -> Float[Array, "c s"]:
        """The scores, -inf where the row does not see the key."""
        row, key = rows[:, None], keys[None, :]
        conditions = [key <= row] if self.causal else []
        conditions += [key > row - self.window] if self.window is not None else []
        conditions += [key < limit] if self.limited else []
        conditions += [segments[0][:, None] == segments[1][None, :]] if segments else []
        for condition in conditions:
            scores = jnp.where(condition, scores, -jnp.inf)
        return scores

    def blocks_of_keys(
        self, first_row: Int[Array, ""], limit: Int[Array, ""]
    ) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """The first block of keys that a block of rows sees, and the one behind the last."""
        begin: Any = 0
        end: Any = self.k_blocks
        if self.causal:
            end = jnp.minimum(end, _blocks_until(first_row + self.rows, self.keys))
        if self.limited:
            end = jnp.minimum(end, _blocks_until(limit, self.keys))
        if self.window is not None:
            begin = lax.div(jnp.maximum(first_row - self.window + 1, 0), self.keys)
        return begin, end

    def blocks_of_rows(
        self, first_key: Int[Array, ""]
    ) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """The first block of rows that sees a block of keys, and the one behind the last.

        Args:
          first_key: counted from the tile's first row.
        """
        begin: Any = 0
        end: Any = self.q_blocks
        if self.causal:
            begin = lax.div(jnp.maximum(first_key, 0), self.rows)
        if self.window is not None:
            end = jnp.minimum(
                end, _blocks_until(first_key + self.keys + self.window - 1, self.rows)
            )
        return begin, end


def _result_kernel(*refs: Ref, tile: _Tile) -> None:
    (offset_ref, q_ref, k_ref, v_ref), segments, (out_ref, lse_ref) = _split(refs, tile, 4)
    first_row = offset_ref[0] + _program_id(0) * tile.rows
    limit = offset_ref[1]
    q = q_ref[...]
    own = _block(_program_id(0), tile.rows)
    row = first_row + jnp.arange(tile.rows)

    def step(
        index: Int[Array, ""],
        carry: tuple[Float[Array, "c H"], Float[Array, " c"], Float[Array, " c"]],
    ) -> tuple[Float[Array, "c H"], Float[Array, " c"], Float[Array, " c"]]:
        out, total, peak = carry
        block = _block(index, tile.keys)
        scores, _ = tile.scores(_dot(q, k_ref[block, :], 1, 1))
        key = index * tile.keys + jnp.arange(tile.keys)
        scores = tile.hide(scores, row, key, limit, _segments_of(segments, own, block))
        new_peak = jnp.maximum(peak, scores.max(1))
        weights, fade = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        v = v_ref[block, :]
        out = out * fade[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, total * fade + weights.sum(1), new_peak

    zeros = jnp.zeros(tile.rows, jnp.float32)
    begin, end = tile.blocks_of_keys(first_row, limit)
    carry = jnp.zeros(q.shape, jnp.float32), zeros, zeros + LOWEST
    out, total, peak = lax.fori_loop(begin, end, step, carry)
    nonzero = jnp.where(total == 0, 1.0, total)
    out_ref[...] = (out / nonzero[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total == 0, -jnp.inf, (peak + jnp.log2(nonzero)) / _LOG2_E)


def _queries_kernel(*refs: Ref, tile: _Tile) -> None:
    inputs, segments, (dq_ref,) = _split(refs, tile, 7)
    offset_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref = inputs
    first_row = offset_ref[0] + _program_id(0) * tile.rows
    limit = offset_ref[1]
    q, dout, lse, delta = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    own = _block(_program_id(0), tile.rows)
    row = first_row + jnp.arange(tile.rows)

    def step(index: Int[Array, ""], dq: Float[Array, "c H"]) -> Float[Array, "c H"]:
        block = _block(index, tile.keys)
        k, v = k_ref[block, :], v_ref[block, :]
        key = index * tile.keys + jnp.arange(tile.keys)
        ids = _segments_of(segments, own, block)
        _, dproducts = _score_gradients(q, k, v, dout, lse, delta, row, key, limit, ids, tile)
        return dq + _dot(dproducts, k, 1, 0)

    begin, end = tile.blocks_of_keys(first_row, limit)
    dq = lax.fori_loop(begin, end, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * tile.scale).astype(dq_ref.dtype)


def _keys_kernel(*refs: Ref, tile: _Tile) -> None:
    inputs, segments, (dk_ref, dv_ref) = _split(refs, tile, 7)
    offset_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref = inputs
    offset, limit = offset_ref[0], offset_ref[1]
    first_key = _program_id(0) * tile.keys
    k, v = k_ref[...], v_ref[...]
    own = _block(_program_id(0), tile.keys)
    key = first_key + jnp.arange(tile.keys)
    begin, end = tile.blocks_of_rows(first_key - offset)

    def one_head(
        head: Int[Array, ""], carry: tuple[Float[Array, "s H"], Float[Array, "s H"]]
    ) -> tuple[Float[Array, "s H"], Float[Array, "s H"]]:
        def step(
            index: Int[Array, ""], carry: tuple[Float[Array, "s H"], Float[Array, "s H"]]
        ) -> tuple[Float[Array, "s H"], Float[Array, "s H"]]:
            dk, dv = carry
            block = _block(index, tile.rows)
            q, dout = q_ref[head, block, :], dout_ref[head, block, :]
            lse, delta = lse_ref[head, block], delta_ref[head, block]
            row = offset + index * tile.rows + jnp.arange(tile.rows)
            ids = _segments_of(segments, block, own)
            weights, dproducts = _score_gradients(
                q, k, v, dout, lse, delta, row, key, limit, ids, tile
            )
            return dk + _dot(dproducts, q, 0, 0), dv + _dot(weights.astype(dout.dtype), dout, 0, 0)

        return lax.fori_loop(begin, end, step, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, q_ref.shape[0], one_head, (zeros, zeros))
    dk_ref[...] = (dk * tile.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _score_gradients(
    q: Float[Array, "c H"],
    k: Float[Array, "s H"],
    v: Float[Array, "s H"],
    dout: Float[Array, "c H"],
    lse: Float[Array, " c"],
    delta: Float[Array, " c"],
    row: Int[Array, " c"],
    key: Int[Array, " s"],
    limit: Int[Array, ""],
    segments: Segments | None,
    tile: _Tile,
) -> tuple[Float[Array, "c s"], Float[Array, "c s"]]:
    """The weights of a block, and the gradient of its products before they are scaled."""
    scores, slope = tile.scores(_dot(q, k, 1, 1))
    scores = tile.hide(scores, row, key, limit, segments)
    weights = jnp.exp2(scores - lse[:, None])
    dscores = weights * (_dot(dout, v, 1, 1) - delta[:, None])
    dproducts = dscores if slope is None else dscores * slope
    return weights, dproducts.astype(q.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """The operands of a tile's kernels, and how a kernel's programs share them out."""

    q: Float[Array, "B K G T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
    offset: Int[Array, "2"]  # of the first row and of the padding, counted from the first key
    rule: Rule

    @classmethod
    def of(cls, rows: Rows, keys: Keys, rule: Rule) -> _Call:
        first = keys.start[0]
        limit = jnp.int32(0) if rule.keys is None else rule.keys - first
        segments = None
        if rows.segments is not None and keys.segments is not None:
            segments = rows.segments[0], keys.segments[0]
        k, v = keys.kv[0]
        return cls(
            q=_pad_heads(rows.q[0]),
            k=_pad_heads(k),
            v=_pad_heads(v),
            segments=segments,
            offset=jnp.stack([rows.start[0] - first, limit]).astype(jnp.int32),
            rule=rule,
        )

    def tile(self, rows: int, keys: int) -> _Tile:
        return _Tile(
            rows=rows,
            keys=keys,
            q_blocks=self.q.shape[3] // rows,
            k_blocks=self.k.shape[2] // keys,
            scale=self.rule.scale,
            soft_cap=self.rule.soft_cap,
            causal=self.rule.causal,
            window=self.rule.window,
            limited=self.rule.keys is not None,
            segmented=self.segments is not None,
        )

    def run(
        self,
        kernel: functools.partial[None],
        *,
        grid: tuple[int, int, int],
        inputs: list[Spec],
        segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
        outputs: list[Spec],
        warps: int,
    ) -> Sequence[Shaped[Array, "..."]]:
        pallas, triton = _pallas(), _triton()
        inputs = [(self.offset, pallas.BlockSpec((2,), lambda i, h, b: (0,))), *inputs]
        for ids in segments or ():
            spec = pallas.BlockSpec((None, ids.shape[1]), lambda i, h, b: (b, 0))
            inputs.append((ids.astype(jnp.int32), spec))
        return pallas.pallas_call(
            kernel,
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
            interpret=self.rule.platform == "cpu",
            name=kernel.func.__name__.strip("_"),
        )(*(x for x, _ in inputs))

    def rows_of_block(self, x: Float[Described, "B K G T *H"], rows: int) -> Spec:
        """An array `[B, K, G, T]` or `[B, K, G, T, H]`, of which a program gets a block of rows."""
        G = self.q.shape[2]
        block = (None, None, None, rows, *x.shape[4:])
        last = (0,) * (x.ndim - 4)
        return x, _pallas().BlockSpec(block, lambda i, h, b: (b, h // G, h % G, i, *last))

    def rows_of_head(self, x: Float[Described, "B K G T *H"]) -> Spec:
        """The same, of which a program gets all rows that a head of keys serves."""
        block = (None, None, *x.shape[2:])
        last = (0,) * (x.ndim - 2)
        return x, _pallas().BlockSpec(block, lambda i, h, b: (b, h, *last))

    def all_keys(self) -> list[Spec]:
        G = self.q.shape[2]
        block = (None, None, *self.k.shape[2:])
        spec = _pallas().BlockSpec(block, lambda i, h, b: (b, h // G, 0, 0))
        return [(self.k, spec), (self.v, spec)]

    def keys_of_block(self, keys: int) -> list[Spec]:
        block = (None, None, keys, self.k.shape[3])
        spec = _pallas().BlockSpec(block, lambda i, h, b: (b, h, i, 0))
        return [(self.k, spec), (self.v, spec)]


def _split(
    refs: tuple[Ref, ...], tile: _Tile, inputs: int
) -> tuple[tuple[Ref, ...], tuple[Ref, ...], tuple[Ref, ...]]:
    """A kernel's references: its inputs, the segments of rows and keys if any, and its outputs."""
    outputs = inputs + 2 * tile.segmented
    return refs[:inputs], refs[inputs:outputs], refs[outputs:]


def _segments_of(refs: tuple[Ref, ...], rows: Slice, keys: Slice) -> Segments | None:
    return (refs[0][rows], refs[1][keys]) if refs else None


def _blocks_until(end: Int[Array, ""], length: int) -> Int[Array, ""]:
    """How many blocks hold the positions from 0 to `end`, which may be below 0."""
    return lax.div(jnp.maximum(end, 0) + (length - 1), length)


def _block(index: Int[Array, ""], length: int) -> Slice:
    return _pallas().ds(index * length, length)


def _program_id(axis: int) -> Int[Array, ""]:
    return _pallas().program_id(axis)


def _dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], of_a: int, of_b: int
) -> Float[Array, "_ _"]:
    """A product over one dimension of each, summed in float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _pad_heads(x: Float[Array, "*rows H"]) -> Float[Array, "*rows _"]:
    """Zeros behind each head, up to a power of two: Triton has no other sizes."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _pallas() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas")


def _triton() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.triton")
