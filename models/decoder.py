"""This file is the decoder-only transformer that every family here configures.

Vaswani et al., "Attention Is All You Need", 2017; pre-norm as in GPT-2 and Llama.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from models.layers import Block, Norm, Sequence
from models.stack import scan, stack, unstack
from sharding.state import named_leaves

_NEVER = -2e30  # attention sees nothing below -1e30; a row of infinities would be NaN


class Decoder(nnx.Module):
    """Tokens to logits, in any dtype of parameters and of compute.

    Built with no mesh at hand; run it inside `with wafer:` to run it on one. Layers of one kind are
    held stacked, and scanned, unless the config says `stacked=False`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
    ):
        """A decoder with random weights in float32.

        Args:
          config: its sizes.
          rngs: the stream `params`.
          dtype: what activations and products are computed in.
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
        self.stages: Any = nnx.List(
            stack(functools.partial(_turn, config, kinds), turns, rngs)
            for kinds, turns in config.stages
        )
        self.norm = Norm(config)
        self.head = None if config.tied else _head(config, rngs)

    @classmethod
    def shapes(
        cls,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
    ) -> "Decoder":
        """A decoder with `jax.ShapeDtypeStruct` for every array; arguments as of the class.

        Nothing is allocated, and layers of one kind are traced once.
        """
        whole = dataclasses.replace(config, stacked=True)
        model = nnx.eval_shape(lambda: cls(whole, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
        if config.stacked:
            return model
        layers = {}
        for kind in dict.fromkeys(config.kinds):
            make = functools.partial(_turn, config, (kind,))
            layers[kind] = nnx.eval_shape(lambda m=make: stack(m, 1, nnx.Rngs(0)))
        model.config = config
        model.stages = nnx.List(nnx.clone(layers[kind]) for kind in config.kinds)
        return model

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        positions: Int[Array, "*B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | Int[Array, "B T"] | Bool[Array, "B T T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token that follows each of `tokens`, in float32.

        Args:
          tokens: from 0 to V - 1; others give NaN.
          positions: of each token, `[T]` or `[B, T]`; by default 0 to T - 1.
          segment_ids: a token sees only those of its own segment, and none after it.
          mask: which tokens are there at all, `[B, T]`; or which tokens, along the last axis, each
            token may see, `[B, T, T]`, of those before it.

        Raises:
          ValueError: the sequence is longer than the context, or the shapes do not fit.
        """
        tokens = jnp.asarray(tokens)
        seen = sequence(self.config, tokens, positions, segment_ids, mask)
        return self.logits(self.hidden(tokens, seen)[0]).astype(jnp.float32)

    def hidden(
        self, tokens: Int[Array, "B T"], seen: Sequence | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """What the final norm gives for each of `tokens`, and the mean load-balance loss."""
        if seen is None:
            seen = sequence(self.config, tokens)

        def step(turn, x):
            losses = []
            for block in turn.blocks:
                x, balance = block(x, seen)
                losses.append(balance)
            return x, jnp.stack(losses).sum()

        x, balance = self.embedded(tokens, seen), jnp.zeros((), jnp.float32)
        for stage in self.stages:
            x, losses = scan(stage, step, x, remat=self.remat)
            balance = balance + losses.sum()
        sparse = sum(kind.sparse for kind in self.config.kinds)
        return self.norm(x), balance / max(sparse, 1)

    def embedded(self, tokens: Int[Array, "B T"], seen: Sequence) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        x = wk.embedding(tokens, self.embedding[...].astype(self.dtype))
        if self.positions is None:
            return x
        learned = self.positions[...].astype(self.dtype)[seen.positions]
        return x + (learned if learned.ndim == 3 else learned[None])

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head: one number for each word of the vocabulary, in the compute dtype."""
        head = self.embedding if self.head is None else self.head
        weight = head[...].T if head.axes[0] == "vocab" else head[...]
        return wk.matmul(hidden, weight.astype(self.dtype))

    def layers(self) -> Iterator[Block]:
        """The layers in order, each with arrays of its own: slices of the stacked ones."""
        for stage in self.stages:
            for turn in unstack(stage):
                yield from turn.blocks  # type: ignore[attr-defined]


def unstacked(model: Decoder) -> Decoder:
    """`model` with each layer's arrays by themselves: copies of its own, if it is stacked."""
    config = dataclasses.replace(model.config, stacked=False)
    if not model.config.stacked:
        return model
    graph, shapes = nnx.split(Decoder.shapes(config, dtype=model.dtype, remat=model.remat))
    leaves = named_leaves(nnx.state(model))
    numbers = {layer: place for layer, place in enumerate(model.config.places())}

    def value(path: str) -> jax.Array:
        if not path.startswith("stages/"):
            return leaves[path].get_value()
        _, layer, _, _, inner = path.split("/", 4)
        stage, position, turn = numbers[int(layer)]
        return leaves[f"stages/{stage}/blocks/{position}/{inner}"][turn : turn + 1]

    paths = iter(named_leaves(shapes))
    state = jax.tree.map(
        lambda leaf: leaf.replace(value(next(paths))),
        shapes,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return nnx.merge(graph, state)


def sequence(
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Any = None,
    segment_ids: Any = None,
    mask: Any = None,
) -> Sequence:
    """What attention has to know of `tokens`; arguments and errors as of a `Decoder`'s call."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens is {tokens.dtype}{list(tokens.shape)}, it must be integers [B, T]"
        )
    B, T = tokens.shape
    if T > config.context:
        raise ValueError(
            f"the sequence has {T} tokens, the model's context is {config.context}; "
            "shorten it or choose a longer context"
        )
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "positions": ((T,), (B, T)),
        "segment_ids": ((B, T),),
        "mask": ((B, T), (B, T, T)),
    }
    for name, given in (("positions", positions), ("segment_ids", segment_ids), ("mask", mask)):
        if given is not None and jnp.shape(given) not in shapes[name]:
            fits = " or ".join(map(str, shapes[name]))
            raise ValueError(
                f"{name} is {jnp.shape(given)} and tokens {tokens.shape}: it must be {fits}"
            )
    bias = None
    if mask is not None and jnp.ndim(mask) == 2:
        # Of a segment of their own, tokens that are not there see something, hence are no NaN.
        ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        segment_ids = jnp.where(jnp.asarray(mask).astype(bool), ids, -1)
    elif mask is not None:
        bias = jnp.where(jnp.asarray(mask).astype(bool), 0.0, _NEVER)[:, None]
    return Sequence(
        positions=jnp.arange(T) if positions is None else jnp.asarray(positions),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
        bias=bias,
    )


class _Turn(nnx.Module):
    """The layers of a stage that come round together."""

    def __init__(self, config: DecoderConfig, kinds: tuple[LayerKind, ...], *, rngs: nnx.Rngs):
        self.blocks = nnx.List(Block(config, kind, rngs=rngs) for kind in kinds)


def _turn(config: DecoderConfig, kinds: tuple[LayerKind, ...], rngs: nnx.Rngs) -> _Turn:
    return _Turn(config, kinds, rngs=rngs)


def _head(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Param:
    if config.weights == "out_in":
        return _param(config, ("vocab", "in"), (config.vocab, config.d_model), rngs)
    return _param(config, ("in", "vocab"), (config.d_model, config.vocab), rngs)


def _param(config: DecoderConfig, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs):
    return nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape), axes=axes)
