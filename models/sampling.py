"""Choose the next token from logits: the likeliest, or one drawn at random.

top-p: A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen.

    Args:
      temperature: 0 takes the likeliest token; higher values sample more freely.
      top_k: sample among the `top_k` likeliest tokens only; None: among all.
      top_p: sample among the fewest likeliest tokens whose probabilities sum to `top_p`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, name: str, vocab: int) -> None:
        """Raises ValueError if a number is out of its range.

        Args:
          name: the operation that samples, for the message.
          vocab: size of the vocabulary.
        """
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"{name}: temperature={self.temperature} must be 0 or more")
        if self.top_k is not None and not 1 <= self.top_k <= vocab:
            raise ValueError(
                f"{name}: top_k={self.top_k} must lie between 1 and the vocabulary, {vocab}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{name}: top_p={self.top_p} must be above 0 and at most 1")


def sequence_keys(key: Key[Array, ""], lengths: Int[Array, " B"]) -> Key[Array, " B"]:
    """A random key for each sequence, from its row and its length alone.

    Hence the other sequences of a batch do not change what a sequence gets.
    """
    rows = jnp.arange(lengths.shape[0])
    return jax.vmap(lambda row, length: jax.random.fold_in(jax.random.fold_in(key, row), length))(
        rows, lengths
    )


def choose(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """The next token of each sequence."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _divide(logits, sampling.temperature)
    if sampling.top_k is not None:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None:
        smallest = _smallest_of_top_p(logits, sampling.top_p)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _divide(logits: Float[Array, "B V"], temperature: float) -> Float[Array, "B V"]:
    """`logits / temperature` less the largest of each sequence: no temperature makes it NaN.

    The nearer to 0, the surer is the likeliest token; the difference to it alone may overflow.
    """
    largest = jnp.max(logits, -1, keepdims=True)
    below = jnp.where(logits == largest, 0, logits - largest)  # infinities too differ by 0
    # In this dtype neither the temperature nor its reciprocal may be 0 or infinite.
    tiny = float(jnp.finfo(logits.dtype).tiny)
    return below / min(max(temperature, tiny), 1 / tiny)


def _smallest_of_top_p(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit among the fewest likeliest tokens whose probabilities sum to `top_p`."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    # A token belongs to the set if those before it do not reach top_p yet. For top_p=0.7:
    #   shares           0.5  0.3  0.15  0.05
    #   sum before each  0    0.5  0.8   0.95   -> the first two belong
    before = jnp.cumsum(shares, axis=-1) - shares
    return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
