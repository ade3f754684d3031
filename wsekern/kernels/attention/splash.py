"""Tiles of attention by JAX's splash attention, the Pallas kernel for TPUs.

Public per-PE functions, without communication. The kernel takes any tile: where its rows and keys
lie in the sequence is an operand, so one program serves every PE and every step of a ring. Blocks
that no row sees are skipped. Elsewhere than on a TPU it runs in Pallas's interpret mode, slowly.

Queries are one block `[1, B, K, G, T, H]` and keys one block `[1, 2, B, K, S, H]`, as in `tile`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from wsekern.kernels.attention.mask import LOWEST, Keys, KeysAndValues, Rows, Rule

Record: TypeAlias = PyTree[Shaped[Array, "..."]]  # a mask, an operand, or what a kernel returns

LANES = 128  # rows of a block are a multiple of this

_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
_Q_BLOCK, _K_BLOCK, _K_COMPUTE = 1024, 1024, 512  # rows and keys of a block, keys of one product
_PARTIAL_BYTES = 32 * 2**20  # of the gradients of queries from each block of keys, before their sum


def missing() -> str:
    """Why this jax has no splash attention whose kernels can be called; "" if it has."""
    try:
        kernel = _kernel()
    except ImportError as error:
        return f"this jax has no splash attention ({error})"
    names = ("_forward", "_bwd_dq", "_bwd_dkv")
    lacks = [name for name in names if not hasattr(kernel, f"_splash_attention{name}")]
    return f"this jax's splash attention lacks {', '.join(lacks)}" if lacks else ""


def attend(
    rows: Rows, keys: Keys, rule: Rule, *, with_lse: bool
) -> tuple[Float[Array, "1 B K G c H"], Float[Array, "1 B K G c"] | None]:
    """A tile's normalized result, and the log-sum-exp of each row's scores in float32.

    Args:
      rows: one block of queries.
      keys: one block of keys.
      rule: how they are scored.
      with_lse: if not, every row must see a key. A row that sees none has a result of 0, and a
        log-sum-exp of -inf.
    """
    q, k, v = _operands(rows, keys)
    blocks = _Blocks.of(rows, keys)
    kernel = _kernel()

    def run(mask: Record, *operands: Record) -> Record:
        return kernel._splash_attention_forward(
            mask,
            *operands,
            None,
            is_mqa=False,
            block_sizes=kernel.BlockSizes(blocks.q, blocks.k, blocks.k_compute),
            save_residuals=with_lse,
            residual_checkpoint_name=None,
            **_options(rule),
        )

    mask = _mask_of_rows(rows, keys, rule, blocks)
    moved = 2 * q.shape[1] * q.shape[2] * _row_bytes(q)  # queries and result
    if with_lse:
        moved += q.shape[1] * q.shape[2] * LANES * 4
    work = _work(rows, keys, rule, blocks, products=2, fetched=blocks.k, moved=moved)
    results = _run(run, work, mask, q, k, v, _segments(rows, keys, rule))
    if not with_lse:
        return results.reshape(rows.q.shape), None
    out, (lse,) = results
    if not rule.rows_see_keys:
        # The kernel gives a row without keys NaN, or the mean of keys that are masked.
        seen = lse > LOWEST
        out = jnp.where(seen[..., None], out, 0)
        lse = jnp.where(seen, lse, -jnp.inf)
    return out.reshape(rows.q.shape), lse.reshape(rows.q.shape[:-1])


def gradients(
    rows: Rows, keys: Keys, rule: Rule
) -> tuple[Float[Array, "1 B K G c H"], KeysAndValues]:
    """What one tile of queries and one of keys add to the gradients, rounded to their dtype.

    The rows' log-sum-exps and deltas are those over all their keys, in this tile and in others. One
    kernel gives all three where there is room for a gradient of the queries from each block of
    keys; else one gives that of the queries, and another the others.
    """
    assert rows.dout is not None and rows.lse is not None and rows.delta is not None
    q, k, v = _operands(rows, keys)
    B, N, T, H = q.shape
    dout = rows.dout[0].reshape(B, N, T, H)
    # A row that sees no key has -inf. Against +inf all its weights are 0.
    lse = rows.lse if rule.rows_see_keys else jnp.where(rows.lse == -jnp.inf, jnp.inf, rows.lse)
    lse, delta = (x[0].reshape(B, N, T) for x in (lse, rows.delta))
    blocks = _Blocks.of(rows, keys)
    kernel = _kernel()
    minor = kernel.QKVLayout.HEAD_DIM_MINOR
    options = dict(
        is_mqa=False, q_layout=minor, k_layout=minor, v_layout=minor, bq=blocks.q, bkv=blocks.k
    )
    options |= _options(rule)
    partial_bytes = q.size * q.dtype.itemsize * (k.shape[2] // blocks.k)
    # Where a window leaves out steps, the kernel would not know whose rows a step has.
    fused = partial_bytes <= _PARTIAL_BYTES and rule.window is None

    def dkv_of(mask: Record, *operands: Record) -> Record:
        return kernel._splash_attention_bwd_dkv(
            *operands,
            mask_info=mask,
            bkv_compute=blocks.k_compute,
            use_fused_bwd_kernel=fused,
            **options,
        )

    def dq_of(mask: Record, *operands: Record) -> Record:
        return kernel._splash_attention_bwd_dq(*operands, mask_info=mask, **options)

    # None stands for the sinks, which have no part in these gradients.
    operands = q, k, v, _segments(rows, keys, rule), None, lse, dout, delta
    mask = _mask_of_keys(rows, keys, rule, blocks)
    # A block of rows is fetched for each block of keys, with its gradient.
    moved = 2 * (N + k.shape[1]) * k.shape[2] * _row_bytes(q) + fused * partial_bytes // B
    products = 5 if fused else 4
    work = _work(rows, keys, rule, blocks, products=products, fetched=blocks.q, moved=moved)
    *_, dk, dv = results = _run(dkv_of, work, mask, *operands, raw=True)
    if fused:
        # JAX's own sum of these, in 16 bits, takes a TPU five times as long.
        parts = [results[-3][:, i].astype(jnp.float32) for i in range(k.shape[2] // blocks.k)]
        dq = functools.reduce(jnp.add, parts).astype(q.dtype)
    else:
        mask = _mask_of_rows(rows, keys, rule, blocks)
        moved = 3 * N * T * _row_bytes(q)  # queries, and the two gradients
        work = _work(rows, keys, rule, blocks, products=3, fetched=blocks.k, moved=moved)
        dq = _run(dq_of, work, mask, *operands)
    return dq.reshape(rows.q.shape), (dk, dv)


def _work(
    rows: Rows,
    keys: Keys,
    rule: Rule,
    blocks: _Blocks,
    *,
    products: int,
    fetched: int,
    moved: int,
) -> dict[str, int]:
    """What a kernel does for one sequence, on the PE that has the most to do.

    Args:
      rows: queries.
      keys: of the same tile.
      rule: which of them are seen.
      blocks: those that no row sees are skipped.
      products: of a block of rows and one of keys, over a head's features.
      fetched: rows of two arrays that are read for each block that is seen.
      moved: bytes that are read and written besides.
    """
    _, _, K, G, T, H = rows.q.shape
    seen = _most_seen(T, _length(keys), rule, blocks)
    scores = K * G * seen * blocks.q * blocks.k
    return dict(
        flops=2 * products * scores * H,
        transcendentals=scores,
        bytes_accessed=moved + 2 * K * G * seen * fetched * _row_bytes(rows.q),
    )


def _row_bytes(x: Float[Array, "..."]) -> int:
    """Bytes of one row of one head."""
    return x.shape[-1] * x.dtype.itemsize


def _most_seen(rows: int, keys: int, rule: Rule, blocks: _Blocks) -> int:
    """The blocks of which some row sees some key, on the PE with the most of them."""
    whole = (rows // blocks.q) * (keys // blocks.k)
    if not rule.causal or rule.row_starts is None:
        return whole
    most = 0
    first_key = np.arange(0, keys, blocks.k)
    for starts in rule.row_starts:
        length = rows // len(starts)
        first = np.concatenate([s + np.arange(0, length, blocks.q) for s in starts])[:, None]
        seen = first_key <= first + blocks.q - 1
        if rule.window is not None:
            seen &= first_key + blocks.k - 1 > first - rule.window
        most = max(most, int(seen.sum()))
    return most


def _run(
    kernel: Callable[..., Record],
    work: dict[str, int],
    mask: Record,
    *operands: Record,
    raw: bool = False,
) -> Any:
    """A kernel on each sequence, which tells the compiler its work.

    Splash attention states none. XLA, which hides transfers behind kernels, takes such a kernel for
    nothing, and so do those who price a program.

    Args:
      kernel: calls `pallas_call` once.
      work: as `_work` returns it.
      mask: the first operand, the same for all sequences.
      operands: the others, with a first axis of sequences.
      raw: return all results of the kernel itself, before what `kernel` makes of them.
    """

    def run(*operands: Record) -> Record:
        traced, shape = jax.make_jaxpr(kernel, return_shape=True)(mask, *operands)
        cost = _pallas().CostEstimate(**work)
        equations = list(traced.eqns)
        [at] = [i for i, e in enumerate(equations) if e.primitive.name == "pallas_call"]
        call = equations[at]
        equations[at] = call.replace(params=call.params | {"cost_estimate": cost})
        jaxpr = traced.jaxpr.replace(eqns=equations)
        if raw:
            jaxpr = jaxpr.replace(eqns=equations[: at + 1], outvars=call.outvars)
        results = jaxpr_as_fun(traced.replace(jaxpr=jaxpr))(*jax.tree.leaves((mask, operands)))
        return results if raw else jax.tree.unflatten(jax.tree.structure(shape), results)

    return jax.vmap(run)(*operands)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Rows, keys, and keys of one product, of a block of the kernel."""

    q: int
    k: int
    k_compute: int

    @classmethod
    def of(cls, rows: Rows, keys: Keys) -> _Blocks:
        stretch = rows.q.shape[-2] // len(rows.start)
        k = _longest_block(_length(keys), _K_BLOCK)
        return cls(_longest_block(stretch, _Q_BLOCK), k, _longest_block(k, _K_COMPUTE))


def _longest_block(length: int, longest: int) -> int:
    """The longest block of whole lanes, of at most `longest` rows, that divides `length`."""
    return max(b for b in range(LANES, longest + 1, LANES) if length % b == 0)


@dataclasses.dataclass(frozen=True)
class _Sees:
    """Whether a row sees a key, by their positions; equal ones are one program."""

    window: int | None

    def __call__(self, row: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        sees = key <= row
        return sees if self.window is None else sees & (key > row - self.window)


def _kernel() -> ModuleType:
    return importlib.import_module(_MODULE)


def _options(rule: Rule) -> dict[str, Any]:
    return dict(
        mask_value=_kernel().DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=rule.soft_cap,
        mask_function=_Sees(rule.window) if rule.causal else None,
        interpret=rule.platform == "cpu",
    )


def _operands(
    rows: Rows, keys: Keys
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    _, B, K, G, T, H = rows.q.shape
    k, v = keys.kv[0]
    return rows.q.reshape(B, K * G, T, H), k, v


def _length(keys: Keys) -> int:
    return keys.kv[0][0].shape[-2]


def _segments(rows: Rows, keys: Keys, rule: Rule) -> Any:
    """The segments of both as the kernel takes them; padding of the keys has its own."""
    of_rows, of_keys = rows.segments, keys.segments
    if of_rows is None and rule.keys is None:
        return None
    if of_rows is None or of_keys is None:
        B, T = rows.q.shape[1], rows.q.shape[-2]
        of_rows, of_keys = (jnp.zeros((1, B, n), jnp.int32) for n in (T, _length(keys)))
    of_rows, of_keys = of_rows[0].astype(jnp.int32), of_keys[0].astype(jnp.int32)
    if rule.keys is not None:
        position = keys.start[0] + jnp.arange(of_keys.shape[1])
        padding = jnp.broadcast_to(position[None] >= rule.keys, of_keys.shape)
        of_keys = jnp.where(padding, jnp.iinfo(jnp.int32).min, of_keys)
    return _kernel().SegmentIds(of_rows, of_keys)


def _mask_of_rows(rows: Rows, keys: Keys, rule: Rule, blocks: _Blocks) -> Any:
    """Which blocks of keys each block of rows meets, for the result and the gradient of queries."""
    if not rule.causal:
        return _no_mask()
    n, length = _length(keys) // blocks.k, blocks.q
    first = _positions(rows, keys)[::length]
    last_seen = jnp.minimum((first + length - 1) // blocks.k, n - 1)
    if rule.window is None:
        first_seen, steps = jnp.zeros_like(first), n
    else:
        first_seen = jnp.maximum((first - rule.window + 1) // blocks.k, 0)
        steps = min(n, (length + rule.window - 2) // blocks.k + 2)
    block = first_seen[:, None] + jnp.arange(steps)[None]
    sees = block <= last_seen[:, None]
    # In place of a block that is not seen, the kernel fetches the one that is needed next.
    following = jnp.roll(first_seen, -1)[:, None]
    block = jnp.where(sees, block, jnp.minimum(following, n - 1))
    return _mask(block, sees, rows, keys)


def _mask_of_keys(rows: Rows, keys: Keys, rule: Rule, blocks: _Blocks) -> Any:
    """Which blocks of rows each block of keys meets, for the gradient of keys and values."""
    if not rule.causal:
        return _no_mask()
    T, S = rows.q.shape[-2], _length(keys)
    n, length = T // blocks.q, blocks.k
    if rule.window is None:
        last_row = _positions(rows, keys)[blocks.q - 1 :: blocks.q, None]
        sees = last_row >= jnp.arange(0, S, length)[None]
        block = jnp.arange(n)[:, None]
        # The next one that is seen, and behind the last one the first.
        following = lax.cummin(jnp.where(sees, block, n), 0, reverse=True)
        block = jnp.where(following < n, following, jnp.minimum(following[:1], n - 1))
        return _mask(block, sees, rows, keys)
    first = keys.start[0] - rows.start[0] + jnp.arange(0, S, length)
    first_seen = jnp.maximum(first // blocks.q, 0)
    last_seen = jnp.minimum((first + length + rule.window - 2) // blocks.q, n - 1)
    steps = min(n, (length + rule.window - 2) // blocks.q + 2)
    block = first_seen[None] + jnp.arange(steps)[:, None]
    sees = (block >= first_seen[None]) & (block <= last_seen[None])
    block = jnp.where(sees, block, jnp.minimum(first_seen, n - 1)[None])
    return _mask(block, sees, rows, keys)


def _positions(rows: Rows, keys: Keys) -> Int[Array, " T"]:
    """The position of each row, counted from the first key."""
    length = rows.q.shape[-2] // len(rows.start)
    return ((rows.start - keys.start[0])[:, None] + jnp.arange(length)[None]).reshape(-1)


def _mask(block: Int[Array, "_ _"], sees: Bool[Array, "_ _"], rows: Rows, keys: Keys) -> Any:
    return _no_mask()._replace(
        data_next=block[None].astype(jnp.int32),
        block_mask=sees[None].astype(jnp.int32),
        q_sequence=_positions(rows, keys).astype(jnp.int32),
    )


def _no_mask() -> Any:
    return _kernel().mask_info_lib.MaskInfo(None, None, None, None, None)


def _pallas() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas")
