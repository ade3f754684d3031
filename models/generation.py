"""This file is text from a decoder: prompts read at once, then one token after another.

Keys and values are kept in a cache along y of the wafer, each layer's for itself; layers that see a
window keep the window alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

import wsekern as wk
from models import sampling
from models.decoder import Decoder, sequence, unstacked
from models.layers import Sequence
from models.sampling import Sampling
from wsekern.wafer import context

_AHEAD = 8  # steps in flight before the host reads a token


class Step(NamedTuple):
    """What one step gives, for each sequence of the batch."""

    tokens: np.ndarray  # [B] int32
    logprobs: np.ndarray  # [B] float32: of the token, by the model itself, in nats
    ended: np.ndarray  # [B] bool: whether it is, or comes after, a token that ends the text


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("caches", "tokens", "lengths", "ended"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationState:
    caches: list[wk.KVCache]
    tokens: Int[Array, "B"]  # the newest of each sequence, not yet in the caches
    lengths: Int[Array, "B"]  # of each sequence, the newest token left out
    ended: Bool[Array, "B"]


def generate(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    lengths: Any = None,
    stop: tuple[int, ...] = (),
) -> Int[Array, "B _"]:
    """`tokens` continued by `max_new_tokens` more, `[B, T + max_new_tokens]`.

    Of shorter prompts the continuation stands right behind the prompt, and zeros after it. Once a
    text is longer than the model's context, its beginning is forgotten; each token then costs a
    pass over the whole context.

    Args:
      model: a decoder; load it with `stacked=False` to generate often: else its layers are copied
        apart each time.
      tokens: the prompts, at least one token each.
      max_new_tokens: how many to add.
      temperature: 0 takes the likeliest token; higher values sample more freely.
      top_k: sample among that many likeliest tokens only; None: among all.
      top_p: sample among the likeliest tokens that have this much of the probability together.
      key: the random key to sample with; needed if `temperature` is above 0. What a sequence gets
        depends on its place in the batch, and on nothing else of the batch.
      lengths: tokens of each prompt, `[B]`; what stands after them in `tokens` is ignored.
      stop: tokens that end a text; it is filled up with zeros.

    Raises:
      ValueError: a prompt is empty or beyond the context, a number is out of range, or sampling has
        no key.
    """
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    lengths = _check(model, tokens, lengths, max_new_tokens, how, key)
    key = jax.random.key(0) if key is None else key
    if int(lengths.max()) + max_new_tokens > model.config.context:
        graph, params = nnx.split(model)
        return _sliding(graph, params, tokens, key, max_new_tokens, how)
    text = np.zeros((tokens.shape[0], tokens.shape[1] + max_new_tokens), np.int32)
    for row, length in enumerate(lengths):
        text[row, :length] = tokens[row, :length]
    rows, at = np.arange(len(lengths)), lengths.copy()
    steps = stream(model, tokens, how, max_new_tokens, key=key, lengths=lengths, stop=stop)
    ended = np.zeros(len(lengths), bool)
    for step in steps:
        text[rows, at] = np.where(ended, 0, step.tokens)
        ended, at = step.ended, at + 1
    return jnp.asarray(text)


def stream(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    how: Sampling,
    max_new_tokens: int,
    *,
    key: jax.Array,
    lengths: np.ndarray,
    stop: tuple[int, ...] = (),
) -> Iterator[Step]:
    """The continuation of `tokens`, a step at a time; it ends when every text has.

    Prompts are padded to a length, and the cache to a size, of few: each is compiled once. The
    arguments are those of `generate`, which checks them.
    """
    if not max_new_tokens:
        return
    graph, params = nnx.split(unstacked(model))
    T = int(lengths.max())
    context_ = model.config.context
    padded = np.zeros((len(lengths), min(_bucket(T), context_)), np.int32)
    padded[:, :T] = np.asarray(tokens)[:, :T]
    capacity = min(_bucket(max(T + max_new_tokens, padded.shape[1])), context_)
    ends = jnp.asarray(stop, jnp.int32)
    wafer = context.resolve(None)
    state, found = prefill(
        graph, params, padded, jnp.asarray(lengths, jnp.int32), key, ends, how, capacity, wafer
    )
    ahead = [found]
    for _ in range(max_new_tokens - 1):
        state, found = decode(graph, params, state, key, ends, how, wafer)
        ahead.append(found)
        if len(ahead) > _AHEAD or stop:
            step = _read(ahead.pop(0))
            yield step
            if step.ended.all():
                return
    for found in ahead:
        step = _read(found)
        yield step
        if step.ended.all():
            return


def _read(found) -> Step:
    return Step(*map(np.asarray, found))


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def prefill(graph, params, tokens, lengths, key, ends, how, capacity, wafer):
    """The state after prompts, and their first token."""
    model = nnx.merge(graph, params)
    config = model.config
    seen = sequence(config, tokens)
    x, caches = model.embedded(tokens, seen), []

    def recall(attention, q, k, v):
        empty = wk.KVCache.empty(
            batch=tokens.shape[0],
            capacity=capacity,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.d_head,
            window=attention.kind.window,
            dtype=k.dtype,
            wafer=wafer,
        )
        caches.append(empty.fill(k, v, lengths))
        return attention.attended(q, k, v, seen)

    for block in model.layers():
        x, _ = block(x, seen, recall)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    state = GenerationState(
        caches=caches,
        tokens=jnp.zeros_like(lengths),
        lengths=lengths,
        ended=jnp.zeros(lengths.shape, jnp.bool_),
    )
    return _chosen(model, last, state, key, ends, how)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def decode(graph, params, state, key, ends, how, wafer):
    """The state after one more token, and the next."""
    del wafer  # the caches know it; it is here so that no other wafer's program is taken
    model = nnx.merge(graph, params)
    seen = Sequence(positions=state.lengths[:, None])
    x = model.embedded(state.tokens[:, None], seen)
    caches: list[wk.KVCache] = []

    def recall(attention, q, k, v):
        cache = state.caches[len(caches)].append(k, v)
        caches.append(cache)
        sinks = None if attention.sinks is None else attention.sinks[...].astype(jnp.float32)
        return wk.decode_attention(q, cache, scale=attention.kind.scale, sinks=sinks)

    for block in model.layers():
        x, _ = block(x, seen, recall)
    grown = dataclasses.replace(state, caches=caches, lengths=state.lengths + 1)
    return _chosen(model, x, grown, key, ends, how)


def _chosen(model, x, state, key, ends, how):
    logits = model.logits(model.norm(x))[:, 0].astype(jnp.float32)
    keys = sampling.keys(key, state.lengths)
    tokens = sampling.choose(logits, keys, how)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    ended = state.ended | (tokens[:, None] == ends[None]).any(1)
    state = dataclasses.replace(state, tokens=tokens, ended=ended)
    # Copies: the state is donated to the next step before the host has read these.
    return state, (tokens + 0, logprobs, ended | False)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _sliding(graph, params, tokens, key, max_new_tokens, how):
    """The whole text, each token by a pass over as much of its end as the context holds."""
    T = tokens.shape[1]
    text = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
    window = nnx.merge(graph, params).config.context

    def extend(length, text):
        model = nnx.merge(graph, params)
        start = jnp.maximum(0, length - window)
        # What follows in the window is not seen by position `length - 1`: attention is causal.
        x, _ = model.hidden(jax.lax.dynamic_slice_in_dim(text, start, window, axis=1))
        last = jax.lax.dynamic_slice_in_dim(x, length - 1 - start, 1, axis=1)
        logits = model.logits(last)[:, 0].astype(jnp.float32)
        keys = sampling.keys(key, jnp.full(text.shape[0], length))
        token = sampling.choose(logits, keys, how)
        return jax.lax.dynamic_update_slice_in_dim(text, token[:, None], length, axis=1)

    return jax.lax.fori_loop(T, T + max_new_tokens, extend, text)


def _bucket(size: int) -> int:
    """The least of few lengths that holds `size`: at most a quarter of it is for nothing."""
    step = 16
    while size > 8 * step:
        step *= 2
    return -(-size // step) * step


def _check(model, tokens, lengths, max_new_tokens, how: Sampling, key) -> np.ndarray:
    config = model.config
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"generate: tokens is {tokens.shape}, it must be [B, T] with at least one token"
        )
    B, T = tokens.shape
    lengths = np.full(B, T, np.int32) if lengths is None else np.asarray(lengths)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(
            f"generate: lengths={lengths.tolist()} must be from 1 to {T}, one for each of {B}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens={max_new_tokens} must be 0 or more")
    if lengths.max() > config.context:
        raise ValueError(
            f"generate: a prompt of {lengths.max()} tokens is beyond the model's context of "
            f"{config.context}; shorten it"
        )
    if lengths.max() + max_new_tokens > config.context and lengths.min() < T:
        raise ValueError(
            f"generate: {max_new_tokens} more tokens are beyond the context of {config.context}: "
            "prompts of different lengths cannot slide; ask for fewer"
        )
    how.check("generate", config.vocab)
    if how.temperature > 0 and key is None:
        raise ValueError(
            f"generate: temperature={how.temperature} samples, pass key=jax.random.key(..)"
        )
    return lengths
