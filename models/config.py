"""This file is the sizes and choices of a decoder; it imports no jax, so that `--help` is quick."""

import dataclasses
import typing
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norm blocks; defaults are Llama's choices."""

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    context: int  # the longest sequence, in tokens
    head_size: int | None = None  # None: d_model / heads
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    activation: Literal["swiglu", "gelu"] = "swiglu"
    biases: bool = False  # on every product and, with norm="layer", on the norms
    tied: bool = False  # the head is the embedding, transposed
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("vocab", "d_model", "d_ff", "layers", "heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name, hint in typing.get_type_hints(type(self)).items():
            known = typing.get_args(hint)
            if typing.get_origin(hint) is Literal and getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {known}")
        if self.head_size is not None and self.head_size < 1:
            raise ValueError(f"head_size={self.head_size} must be 1 or more")
        if self.head_size is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of heads={self.heads}; change one of "
                "them or set head_size"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.positions == "rotary" and self.d_head % 2:
            raise ValueError(f"rotary positions need an even head size, it is {self.d_head}")

    @property
    def d_head(self) -> int:
        """Size of one head."""
        return self.d_model // self.heads if self.head_size is None else self.head_size

    @property
    def d_attention(self) -> int:
        """Size of all query heads together."""
        return self.heads * self.d_head

    @property
    def d_kv(self) -> int:
        """Size of all key (or value) heads together."""
        return self.kv_heads * self.d_head

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one training step for each token: three times those of the forward pass.

        Counts the products, two FLOPs a multiply-add, and the causal half of attention's scores;
        not norms, activations, the softmax or recomputation.

        Args:
          context: length of the sequence, in tokens.
        """
        gates = 2 if self.activation == "swiglu" else 1
        block = self.d_model * (2 * self.d_attention + 2 * self.d_kv)
        block += self.d_model * self.d_ff * (gates + 1)
        products = self.layers * block + self.d_model * self.vocab
        scores = self.layers * self.d_attention * context  # 2 products, half of the square
        return 3 * 2 * (products + scores)
