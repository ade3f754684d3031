"""This file is a decoder as parts that a square region of a wafer runs, each with its estimate.

A layer is laid out as in WaferLLM (`wsekern.estimator.validation.waferllm`), at the model's
own sizes, padded to the region: its features are spread over all PEs, whatever its heads. Layers
that are alike are one part, traced once. Experts count as a feed-forward part as wide as those that
a token chooses, in time, and as all of them in memory. The host keeps the embedding, and sends the
rows of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any, Literal

import jax
import jax.numpy as jnp

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from wsekern.estimator.result import Estimate
from wsekern.estimator.validation import waferllm
from wsekern.hardware import Machine

Mode = Literal["decode", "prefill", "train"]
BYTES = 2  # of a parameter, an activation, an entry of the cache
_BLOCKS = 8  # in which the head's weight is streamed, and training takes the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Layers that are alike, or the head; bytes are of one of them, of one PE."""

    name: str
    count: int  # of layers; 1 of the others
    cycles: float
    flops: float
    weights: float  # bytes of a PE that the weights take
    cache: float  # bytes of a PE that keys and values take
    working: float  # bytes of a PE beside these, while it runs
    piece: float  # bytes of a PE of its largest weight
    kept: float = 0.0  # bytes of a PE that training keeps of a layer until its backward pass
    met: float = 1.0  # the share of the weights that the tokens of one time meet

    @property
    def is_layer(self) -> bool:
        """Whether it is not the head."""
        return self.name != "head"


def parts_of(
    config: DecoderConfig, mode: Mode, machine: Machine, side: int, context: int, batch: int
) -> list[Part]:
    """The parts of a model: its layers by kind, and the head.

    Args:
      config: of the model.
      mode: one new token of each sequence, all tokens of one, or forward and backward through them.
      machine: of which the PEs are.
      side: the region is `side x side` PEs.
      context: tokens of a sequence.
      batch: sequences that are decoded together; else a region takes one at a time.
    """
    wafer = wk.Wafer.abstract(machine, side, side)
    pes = side * side
    make = {"decode": _decoded, "prefill": _prefilled, "train": _trained}[mode]
    found = []
    alike = Counter(_signature(kind, context) for kind in config.kinds)
    for (sparse, seen), count in alike.items():
        sizes = _sizes(config, sparse, side)
        e = make(wafer, sizes, _up(seen, side), _up(context, side), batch)
        weights = _layer_bytes(config, sparse, sizes) / pes
        cache = 2 * seen * sizes.d_kv * BYTES * batch / pes if mode != "train" else 0.0
        kept = context * sizes.d_model * BYTES / pes if mode == "train" else 0.0
        name = "layer" if len(alike) == 1 else f"layer that sees {seen:,} tokens"
        found.append(
            Part(
                name=name + (", sparse" if sparse else ""),
                count=count,
                cycles=e.cycles,
                flops=e.flops,
                weights=weights,
                cache=cache,
                working=max(0.0, e.sram_per_pe - _operands(sizes, mode, seen, side, batch)),
                piece=_piece(config, sparse, sizes, side),
                kept=kept,
                met=_met(config, sparse, batch if mode == "decode" else context),
            )
        )
    return [*found, _head(wafer, config, mode, context, batch)]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of a layer, each a multiple of the region's side; queries are `groups` times the keys."""

    d_model: int
    d_ff: int
    d_kv: int
    groups: int
    gated: bool

    @property
    def shapes(self) -> dict[str, Any]:
        d_query = self.groups * self.d_kv
        return waferllm.shapes(
            self.d_model, self.d_ff, jnp.float16, d_query=d_query, d_kv=self.d_kv, gated=self.gated
        )

    @property
    def grouped(self) -> dict[str, Any]:
        """The same, the weights of each group of queries by themselves."""
        if self.groups == 1:
            return self.shapes
        of = jax.ShapeDtypeStruct
        query = (of((self.d_model, self.d_kv), jnp.float16),) * self.groups
        out = (of((self.d_kv, self.d_model), jnp.float16),) * self.groups
        return self.shapes | {"query": query, "out": out}

    @property
    def bytes(self) -> int:
        """Of the weights that a token meets."""
        return sum(s.size for s in self.shapes.values()) * BYTES


def _signature(kind: LayerKind, context: int) -> tuple[bool, int]:
    return kind.sparse, context if kind.window is None else min(kind.window, context)


def _sizes(config: DecoderConfig, sparse: bool, side: int) -> _Sizes:
    d_ff = config.d_ff
    if sparse and config.experts is not None:
        d_ff = config.experts.chosen * config.experts.d_ff
    return _Sizes(
        d_model=_up(config.d_model, side),
        d_ff=_up(d_ff, side),
        d_kv=_up(config.d_kv, side),
        groups=config.heads // config.kv_heads,
        gated=config.gated,
    )


def _layer_bytes(config: DecoderConfig, sparse: bool, sizes: _Sizes) -> float:
    if not sparse or config.experts is None:
        return sizes.bytes
    products = 3 if sizes.gated else 2
    chosen = products * sizes.d_model * sizes.d_ff
    experts = products * config.d_model * config.experts.d_ff * config.experts.count
    router = config.d_model * config.experts.count
    return sizes.bytes + (experts + router - chosen) * BYTES


def _piece(config: DecoderConfig, sparse: bool, sizes: _Sizes, side: int) -> float:
    if sparse and config.experts is not None:
        sizes = dataclasses.replace(sizes, d_ff=_up(config.experts.d_ff, side))
    return max(weight.size for weight in sizes.shapes.values()) * BYTES / side**2


def _met(config: DecoderConfig, sparse: bool, tokens: int) -> float:
    """The share of a layer's weights that so many tokens are likely to meet."""
    if not sparse or config.experts is None:
        return 1.0
    return 1 - (1 - config.experts.chosen / config.experts.count) ** tokens


def _operands(sizes: _Sizes, mode: Mode, seen: int, side: int, batch: int) -> float:
    """Bytes of a PE that an estimate counts as weights and cache, which are counted here."""
    cache = 2 * _up(seen, side) * sizes.d_kv * batch * BYTES if mode == "decode" else 0
    return (sizes.bytes + cache) / side**2


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float16)


@functools.cache
def _decoded(wafer: wk.Wafer, sizes: _Sizes, seen: int, context: int, batch: int) -> Estimate:
    del context
    caches = [_array(batch, seen, sizes.d_kv)] * 2
    run = functools.partial(waferllm.decode_layer, wafer=wafer)
    return wk.estimate(run, _array(batch, sizes.d_model), sizes.shapes, *caches, wafer=wafer)


@functools.cache
def _prefilled(wafer: wk.Wafer, sizes: _Sizes, seen: int, context: int, batch: int) -> Estimate:
    del seen, batch
    run = functools.partial(waferllm.prefill_layer, wafer=wafer)
    return wk.estimate(run, _array(context, sizes.d_model), sizes.grouped, wafer=wafer)


@functools.cache
def _trained(wafer: wk.Wafer, sizes: _Sizes, seen: int, context: int, batch: int) -> Estimate:
    """Forward once to be kept, then forward and backward: only a layer's input is kept."""
    del seen, batch
    layer = functools.partial(waferllm.prefill_layer, wafer=wafer)

    def run(h, weights, slope):
        out = layer(h, weights)
        # The second pass is another time, not the same result: nothing may be shared with it.
        h, weights, slope = jax.lax.optimization_barrier((h, weights, slope))
        return out, jax.vjp(layer, h, weights)[1](slope)

    h = _array(context, sizes.d_model)
    return wk.estimate(run, h, sizes.grouped, h, wafer=wafer)


def _head(wafer: wk.Wafer, config: DecoderConfig, mode: Mode, context: int, batch: int) -> Part:
    """Training takes the vocabulary in blocks, twice: for the sum over all, for the gradients."""
    side = wafer.height
    D, V = _up(config.d_model, side), _up(config.vocab, side)
    weights = D * V * BYTES / side**2
    if mode == "train":
        rows, block = _up(context, side), _up(-(-V // _BLOCKS), side)
        given = _array(rows, D), _array(D, block), jax.ShapeDtypeStruct((rows,), jnp.int32)
        passes = [
            wk.estimate(run, *given, wafer=wafer)
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


def _loss(h, weight, labels):
    logits = wk.matmul(h, weight, algorithm="mesh")
    return wk.cross_entropy(logits[None], labels[None]).mean()


def _up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
