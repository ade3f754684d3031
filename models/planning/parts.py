"""Split a decoder into parts that a square region of a wafer runs, and price each part.

A layer is laid out as in WaferLLM (`wsekern.estimator.validation.waferllm`), at the model's
own sizes, padded to the region: features are spread over all PEs, whatever the heads. Equal layers
are one part, traced once. In time, experts count as one feed-forward layer as wide as the experts
of a token together; in memory, all of them count. The host keeps the embedding, and sends the
tokens' rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from wsekern.estimator.result import Estimate
from wsekern.estimator.validation import waferllm
from wsekern.hardware import Machine

Mode = Literal["decode", "prefill", "train"]
BYTES = 2  # of a parameter, an activation, an entry of the cache
_BLOCKS = 8  # the head's weight is streamed, and trained, in this many blocks of the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Equal layers, or the head. Figures are for one layer; bytes are of one PE."""

    name: str
    count: int  # of equal layers; 1 for the head
    cycles: float
    flops: float
    weights: float  # bytes: the weights
    cache: float  # bytes: keys and values
    working: float  # bytes: all else that the PE needs while the layer runs
    piece: float  # bytes: the largest weight
    kept: float = 0.0  # bytes: the layer's input, which training keeps for the backward pass
    met: float = 1.0  # share of the weights that the tokens of one run use (experts: the chosen)

    @property
    def is_layer(self) -> bool:
        """False for the head."""
        return self.name != "head"


def parts_of(
    config: DecoderConfig, mode: Mode, machine: Machine, side: int, context: int, batch: int
) -> list[Part]:
    """The parts of a model: its layers by kind, then the head.

    Args:
      config: the model's.
      mode: "decode" is one new token of each sequence, "prefill" all tokens of one sequence, and
        "train" their forward and backward passes.
      machine: the kind of wafer.
      side: the region is `side x side` PEs.
      context: tokens of a sequence.
      batch: sequences that are decoded together; prefill and training run one at a time.
    """
    wafer = wk.Wafer.abstract(machine, side, side)
    pes = side * side
    price = {"decode": _price_decode, "prefill": _price_prefill, "train": _price_train}[mode]
    parts = []
    counts = Counter(_signature(kind, context) for kind in config.kinds)
    for (sparse, seen), count in counts.items():
        sizes = _sizes(config, sparse, side)
        estimate = price(wafer, sizes, _up(seen, side), _up(context, side), batch)
        weights = _layer_bytes(config, sparse, sizes) / pes
        cache = 2 * seen * sizes.d_kv * BYTES * batch / pes if mode != "train" else 0.0
        kept = context * sizes.d_model * BYTES / pes if mode == "train" else 0.0
        name = "layer" if len(counts) == 1 else f"layer that sees {seen:,} tokens"
        parts.append(
            Part(
                name=name + (", sparse" if sparse else ""),
                count=count,
                cycles=estimate.cycles,
                flops=estimate.flops,
                weights=weights,
                cache=cache,
                working=max(0.0, estimate.sram_per_pe - _operands(sizes, mode, seen, side, batch)),
                piece=_piece(config, sparse, sizes, side),
                kept=kept,
                met=_share_used(config, sparse, batch if mode == "decode" else context),
            )
        )
    return [*parts, _head(wafer, config, mode, context, batch)]


@dataclasses.dataclass(frozen=True)
class _LayerSizes:
    """Sizes of a layer, padded to multiples of the region's side; `groups` queries for each key."""

    d_model: int
    d_ff: int
    d_kv: int
    groups: int
    gated: bool

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The weights of a layer."""
        d_query = self.groups * self.d_kv
        return waferllm.shapes(
            self.d_model, self.d_ff, jnp.float16, d_query=d_query, d_kv=self.d_kv, gated=self.gated
        )

    @property
    def grouped_shapes(self) -> dict[str, Any]:
        """The weights of a layer, with an array of its own for each group of queries."""
        if self.groups == 1:
            return self.shapes
        query = (_array(self.d_model, self.d_kv),) * self.groups
        out = (_array(self.d_kv, self.d_model),) * self.groups
        return self.shapes | {"query": query, "out": out}

    @property
    def bytes(self) -> int:
        """Bytes of the weights that a token uses, on all PEs."""
        return sum(s.size for s in self.shapes.values()) * BYTES


def _signature(kind: LayerKind, context: int) -> tuple[bool, int]:
    return kind.sparse, context if kind.window is None else min(kind.window, context)


def _sizes(config: DecoderConfig, sparse: bool, side: int) -> _LayerSizes:
    d_ff = config.d_ff
    if sparse and config.experts is not None:
        d_ff = config.experts.chosen * config.experts.d_ff
    return _LayerSizes(
        d_model=_up(config.d_model, side),
        d_ff=_up(d_ff, side),
        d_kv=_up(config.d_kv, side),
        groups=config.heads // config.kv_heads,
        gated=config.gated,
    )


def _layer_bytes(config: DecoderConfig, sparse: bool, sizes: _LayerSizes) -> float:
    """Bytes of a layer's weights on all PEs: all experts, and the router."""
    if not sparse or config.experts is None:
        return sizes.bytes
    products = 3 if sizes.gated else 2
    chosen = products * sizes.d_model * sizes.d_ff
    experts = products * config.d_model * config.experts.d_ff * config.experts.count
    router = config.d_model * config.experts.count
    return sizes.bytes + (experts + router - chosen) * BYTES


def _piece(config: DecoderConfig, sparse: bool, sizes: _LayerSizes, side: int) -> float:
    """Bytes of a PE of the largest weight; of one expert, as experts are streamed one by one."""
    if sparse and config.experts is not None:
        sizes = dataclasses.replace(sizes, d_ff=_up(config.experts.d_ff, side))
    return max(weight.size for weight in sizes.shapes.values()) * BYTES / side**2


def _share_used(config: DecoderConfig, sparse: bool, tokens: int) -> float:
    """The expected share of a layer's weights that `tokens` tokens use."""
    if not sparse or config.experts is None:
        return 1.0
    return 1 - (1 - config.experts.chosen / config.experts.count) ** tokens


def _operands(sizes: _LayerSizes, mode: Mode, seen: int, side: int, batch: int) -> float:
    """Bytes of a PE that an estimate counts as weights and cache; parts count them apart."""
    cache = 2 * _up(seen, side) * sizes.d_kv * batch * BYTES if mode == "decode" else 0
    return (sizes.bytes + cache) / side**2


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float16)


@functools.cache
def _price_decode(
    wafer: wk.Wafer, sizes: _LayerSizes, seen: int, context: int, batch: int
) -> Estimate:
    del context
    caches = [_array(batch, seen, sizes.d_kv)] * 2
    run = functools.partial(waferllm.decode_layer, wafer=wafer)
    return wk.estimate(run, _array(batch, sizes.d_model), sizes.shapes, *caches, wafer=wafer)


@functools.cache
def _price_prefill(
    wafer: wk.Wafer, sizes: _LayerSizes, seen: int, context: int, batch: int
) -> Estimate:
    del seen, batch
    run = functools.partial(waferllm.prefill_layer, wafer=wafer)
    return wk.estimate(run, _array(context, sizes.d_model), sizes.grouped_shapes, wafer=wafer)


@functools.cache
def _price_train(
    wafer: wk.Wafer, sizes: _LayerSizes, seen: int, context: int, batch: int
) -> Estimate:
    """Forward, then forward again and backward: of a layer only the input is kept in between."""
    del seen, batch
    layer = functools.partial(waferllm.prefill_layer, wafer=wafer)

    def run(h: jax.Array, weights: dict[str, Any], cotangent: jax.Array) -> tuple[jax.Array, Any]:
        out = layer(h, weights)
        # The second forward pass runs later: the barrier keeps it from being merged with the first.
        h, weights, cotangent = jax.lax.optimization_barrier((h, weights, cotangent))
        return out, jax.vjp(layer, h, weights)[1](cotangent)

    h = _array(context, sizes.d_model)
    return wk.estimate(run, h, sizes.grouped_shapes, h, wafer=wafer)


def _head(wafer: wk.Wafer, config: DecoderConfig, mode: Mode, context: int, batch: int) -> Part:
    """The head. Training takes the vocabulary in blocks, twice: for its sum, then for gradients."""
    side = wafer.height
    D, V = _up(config.d_model, side), _up(config.vocab, side)
    weights = D * V * BYTES / side**2
    if mode == "train":
        rows, block = _up(context, side), _up(-(-V // _BLOCKS), side)
        operands = _array(rows, D), _array(D, block), jax.ShapeDtypeStruct((rows,), jnp.int32)
        passes = [
            wk.estimate(run, *operands, wafer=wafer)
            for run in (_loss, jax.value_and_grad(_loss, (0, 1)))
        ]
        blocks, working = V / block, passes[-1].sram_per_pe
    else:
        rows = batch if mode == "decode" else 1
        run = functools.partial(waferllm.head, wafer=wafer)
        passes = [wk.estimate(run, _array(rows, D), _array(D, V), wafer=wafer)]
        blocks, working = 1.0, max(0.0, passes[0].sram_per_pe - weights)
    return Part(
        name="head",
        count=1,
        cycles=blocks * sum(e.cycles for e in passes),
        flops=blocks * sum(e.flops for e in passes),
        weights=weights,
        cache=0.0,
        working=working,
        piece=weights / _BLOCKS,
    )


def _loss(
    h: Float[Array, "T D"], weight: Float[Array, "D V"], labels: Int[Array, " T"]
) -> Float[Array, ""]:
    logits = wk.matmul(h, weight, algorithm="mesh_gemm")
    return wk.cross_entropy(logits[None], labels[None]).mean()


def _up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
