"""Splash attention of JAX's own Pallas kernels, as its authors shard it: a peer for `attention`.

Heads lie over x and rows of queries over y; every PE gathers the keys of its heads. It runs on TPUs
only, so that elsewhere it is compiled and never timed.
"""

from collections.abc import Callable
from typing import Any

_BLOCK = 512  # rows of queries, and of keys, in one step of the kernel


def find(wafer: Any, length: int, heads: int, kv_heads: int) -> Callable:
    """Its causal attention of `[B, T, N, H]` arrays on a wafer of TPUs.

    Args:
      wafer: the sequence is split along y, the heads along x.
      length: tokens of a sequence.
      heads: of the queries.
      kv_heads: of keys and values; repeated for the queries that share one.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    causal = splash_attention_mask.CausalMask((length, length))
    rows = min(_BLOCK, length // wafer.height)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=rows, block_kv=_BLOCK, block_kv_compute=_BLOCK, block_q_dkv=rows,
            block_kv_dkv=_BLOCK, block_kv_dkv_compute=_BLOCK, block_q_dq=rows, block_kv_dq=_BLOCK,
        ),
        head_shards=wafer.width,
        q_seq_shards=wafer.height,
    )  # fmt: skip
    mesh = wafer.device_mesh
    specs = kernel.manual_sharding_spec(NamedSharding(mesh, P("x", "y")))
    queries, keys = P(None, "x", "y", None), P(None, "x", None, None)

    def per_pe(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(q, k, v)

    run = jax.shard_map(
        per_pe, mesh=mesh, in_specs=(specs, queries, keys, keys), out_specs=queries, check_vma=False
    )

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return run(kernel, q, k, v).swapaxes(1, 2)

    return attention
