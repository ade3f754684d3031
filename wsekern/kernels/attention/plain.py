"""Attention of one PE by `jax.nn.dot_product_attention`, where that is the thing to call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from wsekern.kernels.attention.operands import Floats, Segments
from wsekern.kernels.attention.plan import AttentionOptions, AttentionPlan


def serves(
    floats: Floats, segments: Segments, options: AttentionOptions, plan: AttentionPlan
) -> bool:
    """Whether `jax.nn.dot_product_attention` is the thing to call.

    It gives a row that sees no key the mean of all values, or NaN. So it serves where every row
    sees a key whatever the numbers are.
    """
    if plan.rule.implementation == "cudnn":
        return True  # its own gradient keeps the log-sum-exps as they are
    without = options.soft_cap is None and options.precision is None
    without = without and floats.sinks is None and floats.bias is None
    # There jax.nn asks for a product that XLA's CPU backend lacks.
    without = without and floats.q.dtype != jnp.float16
    # Elsewhere all scores would be in memory at once.
    on_cpu = plan.rule.platform == "cpu" and plan.rule.implementation == "xla"
    return on_cpu and without and plan.rule.rows_see_keys and options.implementation == "auto"


def plain_attention(
    floats: Floats,
    segments: Int[Array, "B T"] | None,
    options: AttentionOptions,
    plan: AttentionPlan,
) -> Float[Array, "B T N H"]:
    q, k, v = floats.q, floats.k, floats.v
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=options.causal,
        scale=options.scale,
        local_window_size=None if options.window is None else (options.window - 1, 0),
        implementation="cudnn" if plan.rule.implementation == "cudnn" else None,
    )
