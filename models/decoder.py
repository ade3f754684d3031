"""This file is the decoder-only transformer that every family here configures.

Vaswani et al., "Attention Is All You Need", 2017; pre-norm as in GPT-2 and Llama.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig
from models.layers import Block, Norm
from models.stack import scan, stack


class Decoder(nnx.Module):
    """Tokens to logits, in float32 parameters and any compute dtype.

    Built with no mesh at hand; run it inside `with wafer:` to run it on one.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
    ):
        """A decoder with random weights.

        Args:
          config: its sizes.
          rngs: the stream `params`.
          dtype: what activations and products are computed in; parameters stay float32.
          remat: whether the backward pass recomputes each layer from its input.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        # Laid out as an output head transposed, so that a tied head is a tile-by-tile transpose.
        self.embedding = _param(config, ("vocab", "in"), (config.vocab, config.d_model), rngs)
        self.positions = (
            _param(config, ("position", "feature"), (config.context, config.d_model), rngs)
            if config.positions == "learned"
            else None
        )
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), config.layers, rngs)
        self.norm = Norm(config)
        self.head = (
            None
            if config.tied
            else _param(config, ("in", "vocab"), (config.d_model, config.vocab), rngs)
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token that follows each of `tokens`.

        Raises:
          ValueError: the sequence is longer than the context.
        """
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the final norm gives for each of `tokens`, before the head."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(
                f"the sequence has {T} tokens, the model's context is {self.config.context}; "
                "shorten it or choose a longer context"
            )
        x = wk.embedding(tokens, self.embedding[...].astype(self.dtype))
        if self.positions is not None:
            x = x + self.positions[...][None, :T].astype(self.dtype)
        x = scan(self.blocks, x, jnp.arange(T), remat=self.remat)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head: one number for each word of the vocabulary."""
        head = self.embedding[...].T if self.head is None else self.head[...]
        return wk.matmul(hidden, head.astype(self.dtype))


def _param(config: DecoderConfig, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs):
    return nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape), axes=axes)
