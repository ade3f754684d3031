"""This file is which token follows, given the logits: the likeliest, or one drawn at random.

top-p: A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; see `models.generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, what: str, vocab: int) -> None:
        """Raises ValueError where a number is out of its range."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"{what}: temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and not 1 <= self.top_k <= vocab:
            raise ValueError(
                f"{what}: top_k={self.top_k} must lie between 1 and the vocabulary, {vocab}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{what}: top_p={self.top_p} must be above 0 and at most 1")


def keys(key: Key[Array, ""], lengths: Int[Array, "B"]) -> Key[Array, "B"]:
    """A key for each sequence, of its row and its length: a batch changes none of its rows."""
    rows = jnp.arange(lengths.shape[0])
    return jax.vmap(lambda row, length: jax.random.fold_in(jax.random.fold_in(key, row), length))(
        rows, lengths
    )


def choose(logits: Float[Array, "B V"], keys: Key[Array, "B"], how: Sampling) -> Int[Array, "B"]:
    """The next token of each sequence."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k is not None:
        least = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p is not None:
        logits = jnp.where(logits < _least(logits, how.top_p), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _least(logits, top_p):
    """The smallest logit among the likeliest that reach `top_p` together."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
