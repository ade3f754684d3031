"""One step of a model: new tokens of several sequences go through all layers, over paged caches.

A step takes T tokens of each of B sequences. A long prompt is read with B = 1, decoding takes
T = 1, and drafts are verified with T in between: one program for all, so that a token's numbers do
not depend on how it came to be computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import wsekern as wk
from models.decoder import Decoder
from models.layers import Attention, Sequence
from models.stack import scan
from serving.sampler import Chosen, Extras, Rows, choose_tokens


class State(NamedTuple):
    """What lies on the device from step to step; donated to each."""

    cache: wk.KVPages
    last: Int[Array, " slots"]  # the newest token of each slot
    counts: Int[Array, "slots V"]  # of the tokens in each slot's text, for penalties


class Batch(NamedTuple):
    """The tokens of a step: NumPy arrays on the host, JAX arrays on the device."""

    tokens: Any  # [B, T] int32; -1: the newest of the slot
    positions: Any  # [B, T] int32, in the sequence; -1: no token
    tables: Any  # [B, C] int32, the pages of each sequence
    slots: Any  # [B] int32
    chooses: Any  # bool: whether the step ends with new tokens


def run_step(
    model: Decoder,
    state: State,
    batch: Batch,
    rows: Rows,
    extras: Extras,
    *,
    every: bool,
    vocab: int,
    least_rows: int,
) -> tuple[State, Chosen]:
    """The next state, and the tokens that follow those of the batch.

    Args:
      model: its layers are scanned, if they are stacked.
      state: of the step before.
      batch: B T tokens.
      rows: how tokens are chosen; B of them, or B T with `every`.
      extras: biases and grammars of the same rows.
      every: whether each token of the batch has one that follows, which a guess in the batch may
        be; else only the last of each sequence.
      vocab: how many tokens the tokenizer has.
      least_rows: of the head's product; fewer are padded.
    """
    tokens = jnp.where(batch.tokens < 0, state.last[batch.slots][:, None], batch.tokens)
    cache, x = _through_layers(model, state.cache, tokens, batch)
    x = model.norm(x)  # of all tokens alike: of some, it would be summed in another order
    R = len(rows.slots)
    if every:
        x = x.reshape(R, 1, -1)
    else:
        last = jnp.argmax(batch.positions, axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)

    guessed = _guessed_before(tokens, state.counts.shape[1]) if every else None

    def choose() -> Chosen:
        return _choose(model, x, state.counts, rows, extras, guessed, vocab, least_rows)

    chosen = lax.cond(batch.chooses, choose, lambda: _zeros_like(choose))
    last, counts = state.last, state.counts
    # A slot that makes no token is the last one, which nobody reads.
    nobody = len(last) - 1
    if every:
        is_new = _joins_text(chosen, tokens, batch.positions) & (rows.forced < 0)
        slot = jnp.where(is_new, jnp.repeat(batch.slots, tokens.shape[1]), nobody)
    else:
        slot = jnp.where(batch.chooses & (batch.positions.max(1) >= 0), batch.slots, nobody)
        last = last.at[slot].set(chosen.tokens)
    counts = counts.at[slot, chosen.tokens].add(1)
    return State(cache, last, counts), chosen


def _guessed_before(tokens: Int[Array, "B T"], nothing: int) -> Int[Array, "R guesses"]:
    """Of each token of the batch, the guesses that it follows; `nothing` where there are fewer."""
    B, T = tokens.shape
    is_before = jnp.tril(jnp.ones((T, T - 1), bool), -1)
    return jnp.where(is_before[None], tokens[:, None, 1:], nothing).reshape(B * T, T - 1)


def _joins_text(
    chosen: Chosen, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Bool[Array, " R"]:
    """Which tokens are chosen for good: those up to, and in place of, the first wrong guess."""
    right = (chosen.tokens.reshape(tokens.shape)[:, :-1] == tokens[:, 1:]) & (positions[:, 1:] >= 0)
    all_right = jnp.cumprod(right.astype(jnp.int32), axis=1) == 1
    return ((positions >= 0) & jnp.pad(all_right, ((0, 0), (1, 0)), constant_values=True)).ravel()


def _choose(
    model: Decoder,
    x: Float[Array, "R 1 D"],
    counts: Int[Array, "slots V"],
    rows: Rows,
    extras: Extras,
    guessed: Int[Array, "R guesses"] | None,
    vocab: int,
    least_rows: int,
) -> Chosen:
    def choose(padded_rows: int) -> Chosen:
        padded = jnp.pad(x, ((0, padded_rows - len(x)), (0, 0), (0, 0)))
        logits = model.logits(padded)[: len(x), 0]
        return choose_tokens(logits, counts, rows, extras, vocab, guessed)

    # XLA's CPU backend sums a product of few rows in another order than one of many.
    padded_rows = len(x) if model.has_exact_head else max(len(x), least_rows)
    if len(x) > 1 or padded_rows == 1:
        return choose(padded_rows)
    # One row alone takes a third of the time, which decides where no rounding can: for the
    # likeliest token, if it is likelier than all others by far.
    greedy = (rows.temperature[0] == 0) & ~rows.logprobs
    quick = lax.cond(greedy, lambda: choose(1), lambda: _zeros_like(lambda: choose(1)))
    return lax.cond(greedy & quick.sure[0], lambda: quick, lambda: choose(padded_rows))


def _zeros_like(choose: Callable[[], Chosen]) -> Chosen:
    shapes = jax.eval_shape(choose)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _through_layers(
    model: Decoder, cache: wk.KVPages, tokens: Int[Array, "B T"], batch: Batch
) -> tuple[wk.KVPages, Float[Array, "B T D"]]:
    """The cache with the new tokens, and their features after the last layer."""
    sequence = Sequence(positions=jnp.maximum(batch.positions, 0))

    def period(period: Any, carry: tuple) -> tuple[tuple, None]:
        x, cache, layer = carry

        def attend(attention: Attention, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal cache
            cache = cache.write(layer, k, v, batch.tables, batch.positions)
            sinks = None if attention.sinks is None else attention.sinks[...].astype(jnp.float32)
            return wk.paged_attention(
                q,
                cache,
                layer,
                batch.tables,
                batch.positions,
                window=attention.kind.window,
                scale=attention.kind.scale,
                sinks=sinks,
            )

        for block in period.blocks:
            x, _ = block(x, sequence, attend)
            layer = layer + 1
        return (x, cache, layer), None

    carry = model.embed(tokens, sequence), cache, jnp.int32(0)
    for stage in model.stages:
        carry, _ = scan(stage, period, carry, remat=False)
    x, cache, _ = carry
    return cache, x
