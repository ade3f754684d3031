"""Choose the next token of each row on the device, each row in its own way.

Costs that only some requests cause stand behind a `cond`: a step in which no row asks for them
does not pay. min-p: M. N. Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and
Coherent LLM Outputs", 2025. Repetition penalty: N. S. Keskar et al., "CTRL", 2019.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from serving.request import MOST_BIASES, MOST_LOGPROBS

_BLOCK = 128  # tokens whose probabilities are summed first
_CANDIDATES = 128  # likeliest tokens among which top-k and top-p are looked for first
_ROUNDING = 2e-3  # two scores this near to each other, relative to them, may change places
_IN_PROMPT = 1 << 20  # added to a token's count if the prompt has it
BIAS_ROOM = MOST_BIASES + 32  # tokens with a bias in a row: the request's, and its stop tokens


# Any: NumPy arrays on the host, JAX arrays on the device.
class Rows(NamedTuple):
    """How the token of each of R rows is chosen."""

    slots: Any  # [R] int32, whose counts are the row's
    seeds: Any  # [R, 2] uint32
    positions: Any  # [R] int32, of the token that is chosen
    temperature: Any  # [R] float32, as those that follow
    top_k: Any  # [R] int32; the vocabulary, where there is no limit
    top_p: Any
    min_p: Any
    frequency: Any
    presence: Any
    repetition: Any
    forced: Any  # [R] int32: the token that is taken whatever is likely; -1: none
    logprobs: Any  # bool: whether any row needs log-probabilities
    penalized: Any  # bool: whether any row has a penalty
    biased: Any  # bool: whether any row has a bias
    masked: Any  # bool: whether any row has a grammar


class Extras(NamedTuple):
    """What few requests have; kept on the device while none has it."""

    bias_tokens: Any  # [R, BIAS_ROOM] int32; the vocabulary, where there is none
    bias: Any  # [R, BIAS_ROOM] float32
    mask: Any  # [R, V / 32] int32: bit i of word w allows token 32 w + i


class Chosen(NamedTuple):
    """The tokens of a step."""

    tokens: Any  # [R] int32
    sure: Any  # [R] bool: no rounding would make another token the likeliest; of one row only
    finite: Any  # [R] bool; False: the row's logits hold NaN, its token means nothing
    logprobs: Any  # [R] float32, of the tokens; 0 where no row asked
    top_tokens: Any  # [R, MOST_LOGPROBS] int32
    top_logprobs: Any  # [R, MOST_LOGPROBS] float32


def no_extras(rows: int, vocab: int) -> Extras:
    """Extras without a bias or a grammar, as NumPy arrays."""
    return Extras(
        bias_tokens=np.full((rows, BIAS_ROOM), vocab, np.int32),
        bias=np.zeros((rows, BIAS_ROOM), np.float32),
        mask=np.full((rows, -(-vocab // 32)), -1, np.int32),
    )


def count_prompt(vocab: int, prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """What `counts` holds for a request with this prompt and this text so far, int32 `[V]`."""
    counts = np.bincount(text, minlength=vocab)[:vocab].astype(np.int32)
    counts[np.unique(prompt)] += _IN_PROMPT
    return counts


def choose_tokens(
    logits: Float[Array, "R V"],
    counts: Int[Array, "slots V"],
    rows: Rows,
    extras: Extras,
    vocab: int,
    guessed: Int[Array, "R guesses"] | None = None,
) -> Chosen:
    """The next token of each row, and how likely it was.

    Args:
      logits: of the model.
      counts: how often each token is in each slot's text, as `count_prompt` has it.
      rows: how each row chooses.
      extras: biases and grammars.
      vocab: tokens from this number on are never chosen: the tokenizer lacks them.
      guessed: tokens that a row's text has besides those in `counts`, if it comes to that row; V
        where there are fewer.
    """
    logits = logits.astype(jnp.float32)
    if vocab < logits.shape[1]:
        logits = jnp.where(jnp.arange(logits.shape[1])[None] < vocab, logits, -jnp.inf)
    samples = rows.temperature > 0
    likeliest, highest = _find_highest(logits)

    def choose() -> tuple[Int[Array, " R"], Bool[Array, " R"]]:
        scores = lax.cond(rows.penalized, _penalize, lambda x, *_: x, logits, counts, rows, guessed)
        scores = lax.cond(rows.biased, _add_bias, lambda x, _: x, scores, extras)
        scores = lax.cond(rows.masked, _apply_mask, lambda x, _: x, scores, extras)
        greedy, _ = _find_highest(scores)
        tokens = lax.cond(
            samples.any(),
            lambda: jnp.where(samples, _sample(scores, rows), greedy),
            lambda: greedy,
        )
        return tokens, is_sure(scores, greedy)

    # Of rows that all take the likeliest token, the logits are read once and not copied.
    differs = samples.any() | rows.penalized | rows.biased | rows.masked
    tokens, sure = lax.cond(differs, choose, lambda: (likeliest, is_sure(logits, likeliest)))
    tokens = jnp.where(rows.forced >= 0, rows.forced, tokens)
    logprobs, top_tokens, top_logprobs = lax.cond(
        rows.logprobs, _find_logprobs, _no_logprobs, logits, tokens
    )
    # The maximum of a row with NaN is NaN.
    return Chosen(tokens, sure, jnp.isfinite(highest), logprobs, top_tokens, top_logprobs)


def _find_highest(scores: Float[Array, "R V"]) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """The first of the highest scores of each row, and that score.

    XLA's CPU backend takes 20 times as long for an `argmax` of whole rows.
    """
    blocks = _in_blocks(scores, -jnp.inf)
    highest = blocks.max(-1)
    block = jnp.argmax(highest, -1)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(inner, -1)).astype(jnp.int32), highest.max(-1)


def is_sure(scores: Float[Array, "R V"], tokens: Int[Array, " R"]) -> Bool[Array, " R"]:
    """Whether no rounding of the model's last product would make another token the likeliest.

    Of several rows it is not asked for, and False.
    """
    if len(scores) > 1:
        return jnp.zeros(len(scores), bool)
    others = jnp.arange(scores.shape[1])[None] != tokens[:, None]
    best = scores.max(-1)
    second = jnp.where(others, scores, -jnp.inf).max(-1)
    return best - second > _ROUNDING * (1 + jnp.abs(best))


def _in_blocks(x: Float[Array, "R V"], fill: float) -> Float[Array, "R n block"]:
    room = ((0, 0), (0, -x.shape[1] % _BLOCK))
    return jnp.pad(x, room, constant_values=fill).reshape(len(x), -1, _BLOCK)


def _penalize(
    logits: Float[Array, "R V"],
    counts: Int[Array, "slots V"],
    rows: Rows,
    guessed: Int[Array, "R guesses"] | None,
) -> Float[Array, "R V"]:
    counts = counts[rows.slots]
    if guessed is not None:
        counts = counts.at[jnp.arange(len(counts))[:, None], guessed].add(1, mode="drop")
    in_text = counts % _IN_PROMPT
    repetition = rows.repetition[:, None]
    again = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, again, logits)
    logits = logits - rows.frequency[:, None] * in_text
    return logits - jnp.where(in_text > 0, rows.presence[:, None], 0)


def _add_bias(logits: Float[Array, "R V"], extras: Extras) -> Float[Array, "R V"]:
    row = jnp.arange(len(logits))[:, None]
    return logits.at[row, extras.bias_tokens].add(extras.bias, mode="drop")


def _apply_mask(logits: Float[Array, "R V"], extras: Extras) -> Float[Array, "R V"]:
    words: UInt32[Array, "R words"] = lax.bitcast_convert_type(extras.mask, jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    allowed = bits.reshape(len(words), -1)[:, : logits.shape[1]] == 1
    return jnp.where(allowed, logits, -jnp.inf)


def _sample(scores: Float[Array, "R V"], rows: Rows) -> Int[Array, " R"]:
    """A token of each row, drawn with the row's own seed for this position."""
    highest = scores.max(-1, keepdims=True)
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    # Less the highest first: no temperature makes it overflow.
    scaled = jnp.where(scores == highest, 0, (scores - highest) / temperature)
    limited = (rows.top_p < 1).any() | (rows.top_k < scores.shape[1]).any()
    lowest = lax.cond(limited, _lowest_allowed, lambda x, _: jnp.min(x, -1), scaled, rows)
    lowest = jnp.maximum(lowest, jnp.log(rows.min_p))
    weights = jnp.where(scaled >= lowest[:, None], jnp.exp(scaled), 0)
    keys = jax.random.wrap_key_data(rows.seeds, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, rows.positions)
    return _draw(weights, jax.vmap(jax.random.uniform)(keys))


def _draw(weights: Float[Array, "R V"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """A token of each row, with probabilities as its weights, from one uniform number.

    The sums of blocks of tokens lead to a block, the sums within it to the token.
    """
    blocks = _in_blocks(weights, 0)
    totals = blocks.sum(-1)
    reached = jnp.cumsum(totals, -1)
    target = uniform * reached[:, -1]
    block = _first_above(reached, totals, target)
    pick = functools.partial(jnp.take_along_axis, axis=1)
    before = pick(reached - totals, block[:, None])[:, 0]
    inner = pick(blocks, block[:, None, None])[:, 0]
    within = _first_above(jnp.cumsum(inner, -1), inner, target - before)
    return (block * _BLOCK + within).astype(jnp.int32)


def _first_above(
    reached: Float[Array, "R n"], parts: Float[Array, "R n"], target: Float[Array, " R"]
) -> Int[Array, " R"]:
    """The first entry of a running sum that is above `target`; one whose part is not 0."""
    index = (reached <= target[:, None]).sum(-1)
    # Rounding may bring the target up to the whole sum, or to where parts of 0 follow.
    last = parts.shape[1] - 1 - jnp.argmax(parts[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last)


def _lowest_allowed(scaled: Float[Array, "R V"], rows: Rows) -> Float[Array, " R"]:
    """The lowest score that top-k and top-p allow in each row."""
    total = jnp.exp(scaled).sum(-1)
    k = min(_CANDIDATES, scaled.shape[1])
    # In a bound of the vocabulary, a token is allowed if fewer than top_k are better, and if the
    # better ones have less than top_p of the probability.
    best = lax.top_k(scaled, k)[0]
    share = jnp.cumsum(jnp.exp(best), -1) / total[:, None]
    before = share - jnp.exp(best) / total[:, None]
    allowed = (before < rows.top_p[:, None]) & (jnp.arange(k)[None] < rows.top_k[:, None])
    lowest = jnp.where(allowed, best, jnp.inf).min(-1)
    limited = (rows.top_p < 1) | (rows.top_k < scaled.shape[1])
    decided = ~allowed[:, -1] | (k == scaled.shape[1]) | ~limited | (rows.temperature == 0)
    lowest = jnp.where(limited, lowest, -jnp.inf)
    return lax.cond(decided.all(), lambda: lowest, lambda: _by_sorting(scaled, rows))


def _by_sorting(scaled: Float[Array, "R V"], rows: Rows) -> Float[Array, " R"]:
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(shares, -1) - shares
    allowed = (before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    allowed &= jnp.arange(ordered.shape[1])[None] < rows.top_k[:, None]
    return jnp.where(allowed, ordered, jnp.inf).min(-1)


def _find_logprobs(
    logits: Float[Array, "R V"], tokens: Int[Array, " R"]
) -> tuple[Float[Array, " R"], Int[Array, "R 20"], Float[Array, "R 20"]]:
    logprobs = jax.nn.log_softmax(logits)
    k = min(MOST_LOGPROBS, logits.shape[1])
    top, top_tokens = lax.top_k(logprobs, k)
    room = ((0, 0), (0, MOST_LOGPROBS - k))
    of_token = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top = jnp.pad(top, room, constant_values=-jnp.inf)
    return of_token, jnp.pad(top_tokens.astype(jnp.int32), room), top


def _no_logprobs(
    logits: Float[Array, "R V"], tokens: Int[Array, " R"]
) -> tuple[Float[Array, " R"], Int[Array, "R 20"], Float[Array, "R 20"]]:
    R = len(tokens)
    none = jnp.zeros((R, MOST_LOGPROBS), jnp.float32)
    return jnp.zeros(R, jnp.float32), jnp.zeros((R, MOST_LOGPROBS), jnp.int32), none
