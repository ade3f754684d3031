"""This file is text from a decoder, one token after another, greedy or sampled.

Every token costs a forward pass over the whole context: there is no cache of keys and values.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from models.decoder import Decoder


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> Int[Array, "B _"]:
    """`tokens` continued by `max_new_tokens` more, `[B, T + max_new_tokens]`.

    Once the text is longer than the model's context, its beginning is forgotten.

    Args:
      model: a decoder.
      tokens: the prompt, at least one token.
      max_new_tokens: how many to add.
      temperature: 0 takes the likeliest token; higher values sample more freely.
      top_k: sample among that many likeliest tokens only; None: among all.
      key: the random key to sample with; needed if `temperature` is above 0.

    Raises:
      ValueError: the prompt is empty, a number is out of range, or sampling has no key.
    """
    _check(tokens, max_new_tokens, temperature, top_k, key, model.config.vocab)
    graph, params = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _generate(graph, params, tokens, key, max_new_tokens, temperature, top_k)


@jax.jit(static_argnums=(0, 4, 5, 6))
def _generate(graph, params, tokens, key, max_new_tokens, temperature, top_k):
    B, T = tokens.shape
    context = nnx.merge(graph, params).config.context
    text = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    window = min(context, T + max_new_tokens)

    def extend(length, text):
        model = nnx.merge(graph, params)
        start = jnp.maximum(0, length - window)
        # What follows in the window is not seen by position `length - 1`: attention is causal.
        hidden = model.hidden(jax.lax.dynamic_slice_in_dim(text, start, window, axis=1))
        last = jax.lax.dynamic_slice_in_dim(hidden, length - 1 - start, 1, axis=1)
        logits = model.logits(last)[:, 0].astype(jnp.float32)
        token = _choose(logits, jax.random.fold_in(key, length), temperature, top_k)
        return jax.lax.dynamic_update_slice_in_dim(text, token[:, None], length, axis=1)

    return jax.lax.fori_loop(T, T + max_new_tokens, extend, text)


def _choose(logits, key, temperature, top_k):
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _check(tokens, max_new_tokens, temperature, top_k, key, vocab):
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"generate: tokens is {tokens.shape}, it must be [B, T] with at least one token"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be 0 or more")
    if temperature < 0:
        raise ValueError(f"generate: temperature={temperature} must be 0 or more")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"generate: top_k={top_k} must lie between 1 and the vocabulary, {vocab}")
    if temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={temperature} samples, pass key=jax.random.key(..)"
        )
