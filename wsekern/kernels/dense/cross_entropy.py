"""Cross-entropy over a vocabulary that is split along x and never gathered.

M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, section 3.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, Shaped

from wsekern import fabric
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer


def cross_entropy(
    logits: Float[Array, "*batch T V"],
    labels: Integer[Array, "*batch T"],
    *,
    vocab: int | None = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch T"]:
    """`logsumexp(logits) - logits[label]` of every token: its loss in nats, float32.

    Algorithm: Megatron-LM's. Forward, two all-reduces along x, of one and of two words for each
    token; backward, nothing is sent. On a wafer the gradient keeps only `logits`, `labels` and one
    word for each token, and no PE holds more of the vocabulary than its own part. Computed in
    float32; reverse mode only.

    Args:
      logits: of every word of the vocabulary, tiled: tokens along y, vocabulary along x.
      labels: the right words, laid out as the rows of `logits`. A label outside 0 to vocab - 1
        gives a loss of NaN, and the gradient of `logsumexp(logits)` alone.
      vocab: how many of the V columns are words; by default all. The rest is padding: it does not
        count, and its gradient is zero.
      wafer: where to run; by default the current wafer, and the plain local operation without one.

    Raises:
      ValueError: the shapes do not fit one another, the logits are not floating or the labels not
        integers, or `vocab` is not from 1 to V.
    """
    logits, labels = layout.as_array(logits), layout.as_array(labels)
    _check(logits, labels, vocab)
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # V may not fit a byte
    wafer = context.resolve(wafer)
    vocab = logits.shape[-1] if vocab is None else vocab
    if wafer is None:
        return _local(logits, labels, vocab)
    rows = layout.tiled(labels.ndim, ROWS)
    padded = layout.pad(logits, layout.tiled(logits.ndim), wafer), layout.pad(labels, rows, wafer)
    return layout.crop(_cross_entropy(*padded, vocab, wafer), labels.shape, rows, wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(
    logits: Float[Array, "*batch T V"], labels: Integer[Array, "*batch T"], vocab: int, wafer: Wafer
) -> Float[Array, "*batch T"]:
    return _fwd(logits, labels, vocab, wafer)[0]


# Logits, labels, and the log-sum-exp of every row.
Residuals = tuple[Float[Array, "*batch T V"], Integer[Array, "*batch T"], Float[Array, "*batch T"]]


# Plain autodiff would keep the exponentials, in float32, beside the logits.
def _fwd(
    logits: Float[Array, "*batch T V"], labels: Integer[Array, "*batch T"], vocab: int, wafer: Wafer
) -> tuple[Float[Array, "*batch T"], Residuals]:
    tiled, rows = layout.tiled(logits.ndim), layout.tiled(labels.ndim, ROWS)
    kernel = functools.partial(_per_pe, vocab=vocab)
    run = wafer.map(kernel, in_specs=(tiled, rows), out_specs=(rows, rows))
    losses, lse = run(logits, labels)
    return losses, (logits, labels, lse)


def _bwd(
    vocab: int, wafer: Wafer, residuals: Residuals, dlosses: Float[Array, "*batch T"]
) -> tuple[Float[Array, "*batch T V"], None]:
    tiled, rows = layout.tiled(dlosses.ndim + 1), layout.tiled(dlosses.ndim, ROWS)
    kernel = functools.partial(_gradient_per_pe, vocab=vocab)
    run = wafer.map(kernel, in_specs=(tiled, rows, rows, rows), out_specs=tiled)
    return run(*residuals, dlosses), None


_cross_entropy.defvjp(_fwd, _bwd)


def _per_pe(
    logits: Float[Array, "*batch Tt Vt"], labels: Integer[Array, "*batch Tt"], vocab: int
) -> tuple[Float[Array, "*batch Tt"], Float[Array, "*batch Tt"]]:
    words = _words(logits)
    logits = jnp.where(words < vocab, logits.astype(jnp.float32), -jnp.inf)
    largest = fabric.all_reduce(lax.stop_gradient(jnp.max(logits, -1)), COLS, "max")
    # As `logsumexp`: a row of -inf alone has -inf, and not the NaN of -inf less -inf.
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    exponentials = jnp.sum(jnp.exp(logits - largest[..., None]), -1)
    # The label's logit where this PE has its word, else 0: the sum along x is the logit.
    label_logits = jnp.sum(jnp.where(words == labels[..., None], logits, 0), -1)
    both = jnp.stack([exponentials, label_logits])
    exponentials, label_logits = fabric.all_reduce(both, COLS)
    lse = jnp.log(exponentials) + largest
    known = (labels >= 0) & (labels < vocab)
    return jnp.where(known, lse - label_logits, jnp.nan), lse


def _gradient_per_pe(
    logits: Float[Array, "*batch Tt Vt"],
    labels: Integer[Array, "*batch Tt"],
    lse: Float[Array, "*batch Tt"],
    dlosses: Float[Array, "*batch Tt"],
    vocab: int,
) -> Float[Array, "*batch Tt Vt"]:
    words = _words(logits)
    softmax = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
    dlogits = (softmax - (words == labels[..., None])) * dlosses[..., None]
    return jnp.where(words < vocab, dlogits, 0).astype(logits.dtype)


def _words(logits: Float[Array, "*batch Tt Vt"]) -> Integer[Array, "..."]:
    """The word of each column of this PE's tile, broadcastable to the tile."""
    words = fabric.axis_index(COLS) * logits.shape[-1] + jnp.arange(logits.shape[-1])
    return words.reshape((1,) * (logits.ndim - 1) + words.shape)


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnames="vocab", inline=True)
def _local(
    logits: Float[Array, "*batch T V"], labels: Integer[Array, "*batch T"], vocab: int
) -> Float[Array, "*batch T"]:
    logits = logits[..., :vocab].astype(jnp.float32)
    # A negative index would count from the end.
    labels = jnp.where(labels < 0, vocab, labels)
    of_label = jnp.take_along_axis(logits, labels[..., None], -1, mode="fill", fill_value=jnp.nan)
    return jax.nn.logsumexp(logits, -1) - of_label[..., 0]


def _check(logits: Shaped[Array, "..."], labels: Shaped[Array, "..."], vocab: int | None) -> None:
    if logits.ndim < 2:
        raise ValueError(
            f"cross_entropy: logits is {logits.shape}, it must have two dimensions or more: "
            "[..., tokens, vocabulary]"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels is {labels.shape} and logits is {logits.shape}: labels must be "
            f"{logits.shape[:-1]}, one word a row of logits"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"cross_entropy: logits is {logits.dtype}; cast it to a floating dtype")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: labels is {labels.dtype}; cast it to an integer dtype")
    V = logits.shape[-1]
    if vocab is not None and not 1 <= vocab <= V:
        raise ValueError(
            f"cross_entropy: vocab={vocab} and logits is {logits.shape}: it must be from 1 to {V}"
        )
