"""This file is cross-entropy over a vocabulary that is split along x, and never gathered.

M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

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

    Computed in float32. Forward, two all-reduces along x, of one and of two words a token; backward
    nothing is sent. On a wafer nothing is kept but `logits`, `labels` and one word a token, and no
    PE holds more of the vocabulary than its own part. Reverse mode only.

    Args:
      logits: of every word of the vocabulary, tiled: tokens along y, vocabulary along x.
      labels: the words that came, laid out as the rows of `logits`. A label outside 0 to vocab - 1
        gives a loss of NaN, and what `logits` alone give as its gradient.
      vocab: how many of the V columns are words; the rest is padding, which counts for nothing and
        whose gradient is zero. By default all.
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
def _cross_entropy(logits, labels, vocab, wafer):
    return _fwd(logits, labels, vocab, wafer)[0]


# Plain autodiff would keep the exponentials, in float32, beside the logits.
def _fwd(logits, labels, vocab, wafer):
    tiled, rows = layout.tiled(logits.ndim), layout.tiled(labels.ndim, ROWS)
    kernel = functools.partial(_per_pe, vocab=vocab)
    run = wafer.map(kernel, in_specs=(tiled, rows), out_specs=(rows, rows))
    losses, lse = run(logits, labels)
    return losses, (logits, labels, lse)


def _bwd(vocab, wafer, residuals, dlosses):
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
    exponentials = jnp.sum(jnp.exp(logits - largest[..., None]), -1)
    mine = jnp.sum(jnp.where(words == labels[..., None], logits, 0), -1)
    exponentials, label_logits = fabric.all_reduce(jnp.stack([exponentials, mine]), COLS)
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


def _words(logits):
    """The word that each column of this PE's tile stands for."""
    words = fabric.axis_index(COLS) * logits.shape[-1] + jnp.arange(logits.shape[-1])
    return words.reshape((1,) * (logits.ndim - 1) + words.shape)


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnames="vocab", inline=True)
def _local(logits, labels, vocab):
    logits = logits[..., :vocab].astype(jnp.float32)
    # A negative index would count from the end.
    labels = jnp.where(labels < 0, vocab, labels)
    mine = jnp.take_along_axis(logits, labels[..., None], -1, mode="fill", fill_value=jnp.nan)
    return jax.nn.logsumexp(logits, -1) - mine[..., 0]


def _check(logits, labels, vocab):
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
