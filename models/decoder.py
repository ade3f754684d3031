"""The decoder-only transformer that every family of models configures.

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
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from models.layers import Block, Norm, Sequence
from models.quantized import QuantizedTable
from models.stack import scan, stack, unstack
from sharding.rules import Home
from wsekern.wafer.axes import COLS, ROWS


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens to logits, `model(tokens)`.

    It knows no mesh: inside `with wafer:` it runs on that wafer. Layers of one kind are stacked in
    one array and scanned, unless the config says `stacked=False`. Parameters may be cast to any
    dtype; activations and products are computed in `dtype`, logits are returned in float32.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        home: Home = "wafer",
    ) -> None:
        """A decoder with random weights in float32.

        Args:
          config: sizes and choices; `find_preset` gives those of known models.
          rngs: random streams; the weights are drawn from `params`.
          dtype: of activations and products.
          remat: whether the backward pass recomputes each layer from its input instead of storing
            its intermediate values.
          home: where its parameters lie when it is called: "wafer", or "memoryx" if they are split
            over the wafers.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.home: Home = home
        # Laid out like a transposed head, so that a tied head is its transpose tile by tile.
        self.embedding: nnx.Param | QuantizedTable = _param(
            config, ("vocab", "in"), (config.vocab, config.d_model), rngs
        )
        self.positions = (
            _param(config, ("position", "feature"), (config.context, config.d_model), rngs)
            if config.positions == "learned"
            else None
        )
        self.stages: Any = nnx.List(
            stack(functools.partial(_period, config, kinds), periods, rngs)
            for kinds, periods in config.stages
        )
        self.norm = Norm(config)
        self.head: nnx.Param | QuantizedTable | None = None if config.tied else _head(config, rngs)

    @classmethod
    def shapes(
        cls,
        config: DecoderConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
    ) -> "Decoder":
        """A decoder whose arrays are `jax.ShapeDtypeStruct`s; nothing is allocated.

        Layers of one kind are traced once, so that even large models take a second.

        Args:
          config: sizes and choices.
          dtype: of activations and products.
          remat: as for a decoder with weights.
        """
        whole = dataclasses.replace(config, stacked=True)
        model = nnx.eval_shape(lambda: cls(whole, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
        if config.stacked:
            return model
        layers = {}
        for kind in dict.fromkeys(config.kinds):
            make = functools.partial(_period, config, (kind,))
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

        Attention is causal: a token sees itself and tokens before it.

        Args:
          tokens: from 0 to V - 1; any other gives NaN, but padding may hold anything.
          positions: the position of each token, `[T]` or `[B, T]`; by default 0 to T - 1.
          segment_ids: a token sees only tokens of its own segment.
          mask: `[B, T]`, true for tokens and false for padding; or `[B, T, T]`, where
            `mask[b, i, j]` is true if token i may see token j.

        Raises:
          ValueError: the sequence is longer than the context, or the shapes do not fit.
        """
        tokens = jnp.asarray(tokens)
        sequence = make_sequence(self.config, tokens, positions, segment_ids, mask)
        if mask is not None and jnp.ndim(mask) == 2:
            # NaN at a hidden key would reach those that do not see it: 0 times NaN is NaN.
            tokens = jnp.where(jnp.asarray(mask).astype(bool), tokens, 0)
        return self.logits(self.hidden(tokens, sequence)[0]).astype(jnp.float32)

    def hidden(
        self, tokens: Int[Array, "B T"], sequence: Sequence | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Features after the final norm, and the mean load-balance loss of the sparse layers.

        Args:
          tokens: from 0 to V - 1.
          sequence: positions, segments and mask; by default positions 0 to T - 1 and no mask.
        """
        if sequence is None:
            sequence = make_sequence(self.config, tokens)

        def step(period: _Period, x: Float[Array, "B T D"]) -> tuple[jax.Array, jax.Array]:
            losses = []
            for block in period.blocks:
                x, balance = block(x, sequence)
                losses.append(balance)
            return x, jnp.stack(losses).sum()

        x, balance = self.embed(tokens, sequence), jnp.zeros((), jnp.float32)
        for stage in self.stages:
            x, losses = scan(stage, step, x, remat=self.remat, home=self.home, dtype=self.dtype)
            balance = balance + losses.sum()
        sparse = sum(kind.sparse for kind in self.config.kinds)
        return self.norm(x), balance / max(sparse, 1)

    def embed(self, tokens: Int[Array, "B T"], sequence: Sequence) -> Float[Array, "B T D"]:
        """The input of the first layer: embeddings, and learned positions if the model has them."""
        if isinstance(self.embedding, QuantizedTable):
            x = self.embedding.rows(tokens, self.dtype)
        else:
            x = wk.embedding(tokens, self.embedding[...].astype(self.dtype))
        if self.positions is None:
            return x
        table, positions = self.positions[...].astype(self.dtype), sequence.positions
        rows = wk.layout.tiled(positions.ndim, ROWS)
        learned = wk.layout.tilewise(
            _take_rows, table, positions, in_specs=(P(None, COLS), rows), out_specs=P(*rows, COLS)
        )
        return x + (learned if learned.ndim == 3 else learned[None])

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head: one logit for each token of the vocabulary, in the compute dtype."""
        head = self.embedding if self.head is None else self.head
        if isinstance(head, QuantizedTable):
            return head.logits(hidden)
        weight = head[...].T if head.axes[0] == "vocab" else head[...]
        return wk.matmul(hidden, weight.astype(self.dtype))

    @property
    def has_exact_head(self) -> bool:
        """Whether the head sums integers, so that logits do not depend on the number of rows."""
        head = self.embedding if self.head is None else self.head
        return isinstance(head, QuantizedTable) and head.activations is not None

    def layers(self) -> Iterator[Block]:
        """The layers in order, each with arrays of its own: slices of the stacked ones."""
        for stage in self.stages:
            for period in unstack(stage):
                yield from period.blocks  # type: ignore[attr-defined]

    embedded = embed  # the name in release 0.1; to go after release 0.2


def unstack_layers(model: Decoder) -> Decoder:
    """`model` with arrays of its own for each layer; copies them if `model` is stacked."""
    if not model.config.stacked:
        return model
    config = dataclasses.replace(model.config, stacked=False)
    unstacked = Decoder.shapes(config, dtype=model.dtype, remat=model.remat)
    for name in ("embedding", "positions", "norm", "head"):
        setattr(unstacked, name, getattr(model, name))
    # Of a model whose layers alternate between two kinds, layer 5 is in stage 0, at place 1 of the
    # period number 2.
    for layer, (stage, position, period) in enumerate(model.config.places()):
        graph, state = nnx.split(model.stages[stage].blocks[position])

        def slice_of(variable: nnx.Variable, period: int = period) -> nnx.Variable:
            return variable.replace(variable[...][period : period + 1])

        sliced = jax.tree.map(slice_of, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        unstacked.stages[layer].blocks[0] = nnx.merge(graph, sliced)
    return unstacked


def make_sequence(
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | Int[Array, "B T"] | Bool[Array, "B T T"] | None = None,
) -> Sequence:
    """What attention must know about `tokens`; arguments and errors as for calling a `Decoder`."""
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
    for name, array in (("positions", positions), ("segment_ids", segment_ids), ("mask", mask)):
        if array is not None and jnp.shape(array) not in shapes[name]:
            fits = " or ".join(map(str, shapes[name]))
            raise ValueError(
                f"{name} is {jnp.shape(array)} and tokens {tokens.shape}: it must be {fits}"
            )
    bias = None
    if mask is not None and jnp.ndim(mask) == 2:
        # Padding becomes a segment of its own, which no token sees.
        ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        segment_ids = jnp.where(jnp.asarray(mask).astype(bool), ids, -1)
    elif mask is not None:
        bias = jnp.where(jnp.asarray(mask).astype(bool), 0.0, -jnp.inf)[:, None]
    return Sequence(
        positions=jnp.arange(T) if positions is None else jnp.asarray(positions),
        segment_ids=None if segment_ids is None else jnp.asarray(segment_ids),
        bias=bias,
    )


def _take_rows(table: Float[Array, "C D"], rows: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
    return table[rows]


class _Period(nnx.Module):
    """One period of a stage: a layer of each of its kinds, in turn."""

    def __init__(
        self, config: DecoderConfig, kinds: tuple[LayerKind, ...], *, rngs: nnx.Rngs
    ) -> None:
        self.blocks = nnx.List(Block(config, kind, rngs=rngs) for kind in kinds)


def _period(config: DecoderConfig, kinds: tuple[LayerKind, ...], rngs: nnx.Rngs) -> _Period:
    return _Period(config, kinds, rngs=rngs)


def _head(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Param:
    if config.weights == "out_in":
        return _param(config, ("vocab", "in"), (config.vocab, config.d_model), rngs)
    return _param(config, ("in", "vocab"), (config.d_model, config.vocab), rngs)


def _param(
    config: DecoderConfig, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs
) -> nnx.Param:
    return nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape), axes=axes)
