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
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wsekern.kernels.attention.mask import LOWEST, Keys, KeysAndValues, Rows, Rule

LANES = 128  # rows of a block are a multiple of this

_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
_Q_BLOCK, _K_BLOCK, _K_COMPUTE = 1024, 1024, 512  # rows and keys of a block, keys of one product


def missing() -> str:
    """Why this jax has no splash attention whose backward kernels can be called; "" if it has."""
    try:
        kernel = _kernel()
    except ImportError as error:
        return f"this jax has no splash attention ({error})"
    names = ("SplashAttentionKernel", "_splash_attention_bwd_dq", "_splash_attention_bwd_dkv")
    lacks = [name for name in names if not hasattr(kernel, name)]
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
    blocks = _Blocks.of(q.shape[2], k.shape[2])
    kernel = _kernel()
    run = kernel.SplashAttentionKernel(
        _mask_of_rows(rows, keys, rule, blocks),
        None,
        None,
        block_sizes=kernel.BlockSizes(blocks.q, blocks.k, blocks.k_compute),
        is_mqa=False,
        save_residuals=with_lse,
        residual_checkpoint_name=None,
        **_options(rule),
    )
    results = jax.vmap(run)(q, k, v, _segments(rows, keys, rule))
    if not with_lse:
        return results.reshape(rows.q.shape), None
    out, (lse,) = results
    # The kernel gives a row without keys NaN, or the mean of keys that are masked.
    seen = lse > LOWEST
    out = jnp.where(seen[..., None], out, 0)
    lse = jnp.where(seen, lse, -jnp.inf)
    return out.reshape(rows.q.shape), lse.reshape(rows.q.shape[:-1])


def gradients(
    rows: Rows, keys: Keys, rule: Rule
) -> tuple[Float[Array, "1 B K G c H"], KeysAndValues]:
    """What one tile of queries and one of keys add to the gradients, rounded to their dtype.

    The rows' log-sum-exps and deltas are those over all their keys, in this tile and in others.
    """
    assert rows.dout is not None and rows.lse is not None and rows.delta is not None
    q, k, v = _operands(rows, keys)
    B, N, T, H = q.shape
    dout = rows.dout[0].reshape(B, N, T, H)
    # A row that sees no key has -inf. Against +inf all its weights are 0.
    lse = jnp.where(rows.lse == -jnp.inf, jnp.inf, rows.lse)
    lse, delta = (x[0].reshape(B, N, T) for x in (lse, rows.delta))
    blocks = _Blocks.of(T, k.shape[2])
    kernel = _kernel()
    minor = kernel.QKVLayout.HEAD_DIM_MINOR
    options = dict(
        is_mqa=False, q_layout=minor, k_layout=minor, v_layout=minor, bq=blocks.q, bkv=blocks.k
    )
    options |= _options(rule)
    dq_of = functools.partial(
        kernel._splash_attention_bwd_dq,
        mask_info=_mask_of_rows(rows, keys, rule, blocks),
        **options,
    )
    dkv_of = functools.partial(
        kernel._splash_attention_bwd_dkv,
        mask_info=_mask_of_keys(rows, keys, rule, blocks),
        bkv_compute=blocks.k_compute,
        use_fused_bwd_kernel=False,
        **options,
    )

    # None stands for the sinks, which have no part in these gradients.
    operands = q, k, v, _segments(rows, keys, rule), None, lse, dout, delta
    dq = jax.vmap(dq_of)(*operands)
    _, dk, dv = jax.vmap(dkv_of)(*operands)
    return dq.reshape(rows.q.shape), (dk, dv)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Rows, keys, and keys of one product, of a block of the kernel."""

    q: int
    k: int
    k_compute: int

    @classmethod
    def of(cls, rows: int, keys: int) -> _Blocks:
        k = _longest_block(keys, _K_BLOCK)
        return cls(_longest_block(rows, _Q_BLOCK), k, _longest_block(k, _K_COMPUTE))


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
    T, S = rows.q.shape[-2], _length(keys)
    n, length = S // blocks.k, blocks.q
    first = rows.start[0] - keys.start[0] + jnp.arange(0, T, length)
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
    first = keys.start[0] - rows.start[0] + jnp.arange(0, S, length)
    first_seen = jnp.maximum(first // blocks.q, 0)
    if rule.window is None:
        last_seen, steps = jnp.full_like(first, n - 1), n
        block = jnp.broadcast_to(jnp.arange(n)[:, None], (n, len(first)))
    else:
        last_seen = (first + length + rule.window - 2) // blocks.q
        last_seen = jnp.minimum(last_seen, n - 1)
        steps = min(n, (length + rule.window - 2) // blocks.q + 2)
        block = first_seen[None] + jnp.arange(steps)[:, None]
    sees = (block >= first_seen[None]) & (block <= last_seen[None])
    block = jnp.where(sees, block, jnp.minimum(first_seen, n - 1)[None])
    return _mask(block, sees, rows, keys)


def _mask(block: Int[Array, "_ _"], sees: Bool[Array, "_ _"], rows: Rows, keys: Keys) -> Any:
    positions = rows.start[0] - keys.start[0] + jnp.arange(rows.q.shape[-2])
    return _no_mask()._replace(
        data_next=block[None].astype(jnp.int32),
        block_mask=sees[None].astype(jnp.int32),
        q_sequence=positions.astype(jnp.int32),
    )


def _no_mask() -> Any:
    return _kernel().mask_info_lib.MaskInfo(None, None, None, None, None)
