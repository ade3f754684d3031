"""Rotary position embedding: pairs of features turn by an angle that grows with the position.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer


def rotary(
    x: Float[Array, "B T N H"],
    positions: Integer[Array, "*B T"] | None = None,
    *,
    theta: float = 10_000.0,
    frequencies: Float[Array, " H/2"] | None = None,
    wafer: Wafer | None = None,
) -> Float[Array, "B T N H"]:
    """`x` with its features i and i + H/2 turned by `position * frequencies[i]`.

    Feature i is paired with feature i + H/2, as in GPT-NeoX and Llama. Both are on one PE, so
    nothing is sent. Computed in float32, returned in `x`'s dtype; both modes of differentiation.

    Args:
      x: queries or keys, laid out `P("wafer", "y", "x", None)`.
      positions: of each token, `[T]` or `[B, T]`; by default 0 to T - 1.
      theta: the base; frequency i is `theta ** (-2 i / H)`, in radians for each position.
      frequencies: the H/2 frequencies themselves, instead of `theta`.
      wafer: accepted by every operation; here the program is the same on all.

    Raises:
      ValueError: the shapes do not fit, H is odd, or the positions are not integers.
    """
    _check(x, positions, frequencies)
    context.resolve(wafer)  # refuses what is no wafer, and chips that are not there
    if frequencies is None:
        half = x.shape[3] // 2
        frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if positions is None:
        positions = jnp.arange(x.shape[1])
    return _turn(x, positions, frequencies)


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, inline=True)
def _turn(
    x: Float[Array, "B T N H"],
    positions: Integer[Array, "*B T"],
    frequencies: Float[Array, " H/2"],
) -> Float[Array, "B T N H"]:
    # No reshape, which XLA's partitioner cannot split everywhere: new dimensions of size 1 alone.
    new = tuple(range(2 - positions.ndim)) + (-2, -1)
    angles = jnp.expand_dims(positions.astype(jnp.float32), new)
    angles = angles * frequencies.astype(jnp.float32)[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(x.dtype)


def _check(
    x: Shaped[Array, "..."],
    positions: Shaped[Array, "..."] | None,
    frequencies: Shaped[Array, "..."] | None,
) -> None:
    if x.ndim != 4:
        raise ValueError(
            f"rotary: x is {x.shape}, it must have four dimensions: batch, sequence, heads, head "
            "size"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"rotary: x is {x.dtype}; cast it to a floating dtype")
    B, T, _, H = x.shape
    if H % 2:
        raise ValueError(f"rotary: x is {x.shape}: its head size ({H}) must be even")
    if positions is not None and positions.shape not in ((T,), (B, T)):
        raise ValueError(
            f"rotary: positions is {positions.shape} and x is {x.shape}: it must be ({T},) or "
            f"({B}, {T})"
        )
    if positions is not None and not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"rotary: positions is {positions.dtype}; cast it to an integer dtype")
    if frequencies is not None and frequencies.shape != (H // 2,):
        raise ValueError(
            f"rotary: frequencies is {frequencies.shape} and x is {x.shape}: it must be "
            f"({H // 2},), half the head size"
        )
