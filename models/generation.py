"""Text from a decoder: read the prompts at once, then add one token after another.

Each layer keeps a cache of its keys and values along y of the wafer. A layer with a window keeps
the window alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
from numpy.typing import ArrayLike

import wsekern as wk
from models.auto_axes import to_auto_axes
from models.decoder import Decoder, make_sequence, unstack_layers
from models.layers import Attention, Sequence
from models.sampling import Sampling, choose, sequence_keys
from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

_AHEAD = 8  # steps in flight before the host reads a token


class Step(NamedTuple):
    """One new token for each sequence of the batch."""

    tokens: Int[np.ndarray, " B"]
    logprobs: Float[np.ndarray, " B"]  # of the token under the model itself, in nats
    ended: Bool[np.ndarray, " B"]  # whether the text has ended, with this token or before it


_Outputs = tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]  # a Step on the devices


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("caches", "tokens", "lengths", "ended"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationState:
    """What one step hands to the next."""

    caches: list[wk.KVCache]  # of each layer
    tokens: Int[Array, " B"]  # the newest of each sequence, not yet in the caches
    lengths: Int[Array, " B"]  # of each sequence, without the newest token
    ended: Bool[Array, " B"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "lengths", "ended"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """What one pass over the texts hands to the next, where they are longer than the context."""

    tokens: Int[Array, "B L"]  # zeros where there are none yet
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]


_Loop = tuple[Int[Array, ""], Texts]  # the tokens taken so far


def generate(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Key[Array, ""] | None = None,
    lengths: ArrayLike | None = None,
    stop: tuple[int, ...] = (),
) -> Int[Array, "B _"]:
    """`tokens` continued by `max_new_tokens` more, `[B, T + max_new_tokens]`.

    The continuation of a prompt shorter than T follows the prompt directly, with zeros after it.
    Once a text of the batch is as long as the model's context, the model sees the last tokens of
    each text that the context holds; a token then costs a pass over them instead of one step with
    the cache.

    Args:
      model: a decoder; one loaded with `stacked=False` saves a copy of its layers at each call.
      tokens: the prompts, at least one token each.
      max_new_tokens: how many to add.
      temperature: 0 takes the likeliest token; higher values sample more freely.
      top_k: sample among the `top_k` likeliest tokens only; None: among all.
      top_p: sample among the fewest likeliest tokens whose probabilities sum to `top_p`.
      key: the random key to sample with; needed if `temperature` is above 0. What a sequence gets
        depends on its row in the batch, and not on the other sequences.
      lengths: tokens of each prompt, `[B]`; `tokens` beyond them are ignored.
      stop: tokens that end a text; zeros follow them.

    Raises:
      ValueError: a prompt is empty or beyond the context, a number is out of range, or sampling has
        no key.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    lengths = _check("generate", model, tokens, lengths, max_new_tokens, sampling, key)
    key = jax.random.key(0) if key is None else key
    text = np.zeros((tokens.shape[0], tokens.shape[1] + max_new_tokens), np.int32)
    for row, length in enumerate(lengths):
        text[row, :length] = tokens[row, :length]
    rows, ends = np.arange(len(lengths)), lengths.copy()
    ended = np.zeros(len(lengths), bool)
    cached = min(max_new_tokens, model.config.context - int(lengths.max()))
    for step in _steps(model, tokens, sampling, cached, key, lengths, stop):
        text[rows, ends] = np.where(ended, 0, step.tokens)
        ended, ends = step.ended, ends + 1
    if cached == max_new_tokens or ended.all():
        return jnp.asarray(text)
    graph, params = nnx.split(model)
    texts = Texts(tokens=jnp.asarray(text), lengths=jnp.asarray(ends), ended=jnp.asarray(ended))
    stops = jnp.asarray(stop, jnp.int32)
    operands, on_auto_axes = to_auto_axes((params, texts, key, stops))
    with on_auto_axes():
        return _slide(graph, *operands, max_new_tokens - cached, sampling)


def stream(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    key: Key[Array, ""] | None = None,
    lengths: ArrayLike | None = None,
    stop: tuple[int, ...] = (),
) -> Iterator[Step]:
    """The continuation of `tokens`, one `Step` at a time, until every text has ended.

    Prompts are padded to one of few lengths, and caches to one of few sizes: each is compiled once.
    Without `stop`, up to 8 steps are in flight before the first token is read.

    Args:
      model: a decoder; one loaded with `stacked=False` saves a copy of its layers at each call.
      tokens: the prompts, at least one token each.
      sampling: how a token is chosen.
      max_new_tokens: the most tokens to add.
      key: the random key to sample with; needed if the temperature is above 0.
      lengths: tokens of each prompt, `[B]`; `tokens` beyond them are ignored.
      stop: tokens that end a text.

    Raises:
      ValueError: a prompt is empty, prompt and new tokens are beyond the context together, a number
        is out of range, or sampling has no key.
    """
    lengths = _check("stream", model, tokens, lengths, max_new_tokens, sampling, key)
    key = jax.random.key(0) if key is None else key
    return _steps(model, tokens, sampling, max_new_tokens, key, lengths, stop)


def _steps(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "B T"],
    sampling: Sampling,
    max_new_tokens: int,
    key: Key[Array, ""],
    lengths: Int[np.ndarray, " B"],
    stop: tuple[int, ...],
) -> Iterator[Step]:
    if not max_new_tokens:
        return
    graph, params = nnx.split(unstack_layers(model))
    longest, limit = int(lengths.max()), model.config.context
    padded = np.zeros((len(lengths), min(_bucket(longest), limit)), np.int32)
    padded[:, :longest] = np.asarray(tokens)[:, :longest]
    capacity = min(_bucket(max(longest + max_new_tokens, padded.shape[1])), limit)
    operands = params, jnp.asarray(lengths, jnp.int32), key, jnp.asarray(stop, jnp.int32)
    (params, starts, key, ends), on_auto_axes = to_auto_axes(operands)
    # Not around all of it: a generator's context would be its caller's too.
    with on_auto_axes():
        wafer = context.resolve(None)
        state, outputs = prefill(
            graph, params, padded, starts, key, ends, sampling, capacity, wafer
        )
    # The devices run ahead of the host, except where `stop` may end the texts early.
    in_flight = [outputs]
    for _ in range(max_new_tokens - 1):
        with on_auto_axes():
            state, outputs = decode(graph, params, state, key, ends, sampling, wafer)
        in_flight.append(outputs)
        if len(in_flight) > _AHEAD or len(stop):
            step = _to_host(in_flight.pop(0))
            yield step
            if step.ended.all():
                return
    for outputs in in_flight:
        step = _to_host(outputs)
        yield step
        if step.ended.all():
            return


def _to_host(outputs: _Outputs) -> Step:
    return Step(*map(np.asarray, outputs))


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8))
def prefill(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""],
    ends: Int[Array, " E"],
    sampling: Sampling,
    capacity: int,
    wafer: Wafer | None,
) -> tuple[GenerationState, _Outputs]:
    """The state after the prompts, and their first token."""
    model = nnx.merge(graph, params)
    config = model.config
    sequence = make_sequence(config, tokens)
    x = model.embed(tokens, sequence)
    caches: list[wk.KVCache] = []

    def attend_and_fill(
        attention: Attention,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
    ) -> Float[Array, "B T N H"]:
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
        return attention.attend(q, k, v, sequence)

    for block in model.layers():
        x, _ = block(x, sequence, attend_and_fill)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    state = GenerationState(
        caches=caches,
        tokens=jnp.zeros_like(lengths),
        lengths=lengths,
        ended=jnp.zeros(lengths.shape, jnp.bool_),
    )
    return _next_token(model, last, state, key, ends, sampling)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def decode(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    state: GenerationState,
    key: Key[Array, ""],
    ends: Int[Array, " E"],
    sampling: Sampling,
    wafer: Wafer | None,
) -> tuple[GenerationState, _Outputs]:
    """The state after one more token, and the token that follows it."""
    del wafer  # the caches know it; as an argument it keeps apart the programs of two wafers
    model = nnx.merge(graph, params)
    sequence = Sequence(positions=state.lengths[:, None])
    x = model.embed(state.tokens[:, None], sequence)
    caches: list[wk.KVCache] = []

    def attend_to_cache(
        attention: Attention,
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 K H"],
        v: Float[Array, "B 1 K H"],
    ) -> Float[Array, "B 1 N H"]:
        cache = state.caches[len(caches)].append(k, v)
        caches.append(cache)
        sinks = None if attention.sinks is None else attention.sinks[...].astype(jnp.float32)
        return wk.decode_attention(q, cache, scale=attention.kind.scale, sinks=sinks)

    for block in model.layers():
        x, _ = block(x, sequence, attend_to_cache)
    state = dataclasses.replace(state, caches=caches, lengths=state.lengths + 1)
    return _next_token(model, x, state, key, ends, sampling)


def _next_token(
    model: Decoder,
    x: Float[Array, "B 1 D"],
    state: GenerationState,
    key: Key[Array, ""],
    ends: Int[Array, " E"],
    sampling: Sampling,
) -> tuple[GenerationState, _Outputs]:
    x = model.norm(x)
    tokens, logprobs, ended = _choose(model, x, state.lengths, state.ended, key, ends, sampling)
    state = dataclasses.replace(state, tokens=tokens, ended=ended)
    # Copies: the state is donated to the next step before the host has read these.
    return state, (tokens + 0, logprobs, ended | False)


def _choose(
    model: Decoder,
    hidden: Float[Array, "B 1 D"],
    lengths: Int[Array, " B"],
    ended: Bool[Array, " B"],
    key: Key[Array, ""],
    ends: Int[Array, " E"],
    sampling: Sampling,
) -> _Outputs:
    """The token after `hidden`, the features of the last one, in texts of these `lengths`."""
    logits = model.logits(hidden)[:, 0].astype(jnp.float32)
    tokens = choose(logits, sequence_keys(key, lengths), sampling)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    return tokens, logprobs, ended | (tokens[:, None] == ends[None]).any(1)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _slide(
    graph: nnx.GraphDef[Decoder],
    params: nnx.State,
    texts: Texts,
    key: Key[Array, ""],
    ends: Int[Array, " E"],
    new_tokens: int,
    sampling: Sampling,
) -> Int[Array, "B L"]:
    """`texts` with `new_tokens` more; each takes a pass over as much as the context holds."""
    window = nnx.merge(graph, params).config.context

    def extend(state: _Loop) -> _Loop:
        taken, texts = state
        model = nnx.merge(graph, params)
        starts = jnp.maximum(0, texts.lengths - window)
        # The window of a short text reaches beyond its end; attention is causal, so its last token
        # does not see that.
        cut = jax.vmap(lambda text, start: jax.lax.dynamic_slice_in_dim(text, start, window))
        x, _ = model.hidden(cut(texts.tokens, starts))
        last = jnp.take_along_axis(x, (texts.lengths - 1 - starts)[:, None, None], axis=1)
        new, _, ended = _choose(model, last, texts.lengths, texts.ended, key, ends, sampling)
        here = jnp.arange(texts.tokens.shape[1])[None] == texts.lengths[:, None]
        tokens = jnp.where(here, jnp.where(texts.ended, 0, new)[:, None], texts.tokens)
        return taken + 1, Texts(tokens=tokens, lengths=texts.lengths + 1, ended=ended)

    def goes_on(state: _Loop) -> Bool[Array, ""]:
        taken, texts = state
        return (taken < new_tokens) & ~texts.ended.all()

    return jax.lax.while_loop(goes_on, extend, (jnp.int32(0), texts))[1].tokens


def _bucket(size: int) -> int:
    """`size` rounded up to one of few lengths; beyond 48, at most a quarter of that is padding.

    Multiples of 16 up to 128, of 32 up to 256, of 64 up to 512, and so on.
    """
    step = 16
    while size > 8 * step:
        step *= 2
    return -(-size // step) * step


def _check(
    name: str,
    model: Decoder,
    tokens: Shaped[Array | np.ndarray, "..."],
    lengths: ArrayLike | None,
    max_new_tokens: int,
    sampling: Sampling,
    key: Key[Array, ""] | None,
) -> Int[np.ndarray, " B"]:
    """The length of each prompt; raises ValueError where `generate` and `stream` say so."""
    config = model.config
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(
            f"{name}: tokens is {tokens.shape}, it must be [B, T] with at least one token"
        )
    B, T = tokens.shape
    lengths = np.full(B, T, np.int32) if lengths is None else np.asarray(lengths)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(
            f"{name}: lengths={lengths.tolist()} must be from 1 to {T}, one for each of {B}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"{name}: max_new_tokens={max_new_tokens} must be 0 or more")
    longest = int(lengths.max())
    if name == "stream" and longest + max_new_tokens > config.context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are beyond the "
            f"model's context of {config.context}; ask for at most "
            f"{max(config.context - longest, 0)}, or shorten the prompt"
        )
    if longest > config.context:
        raise ValueError(
            f"{name}: a prompt of {longest} tokens is beyond the model's context of "
            f"{config.context}; shorten it"
        )
    sampling.check(name, config.vocab)
    if sampling.temperature > 0 and key is None:
        raise ValueError(
            f"{name}: temperature={sampling.temperature} samples, pass key=jax.random.key(..)"
        )
    return lengths
