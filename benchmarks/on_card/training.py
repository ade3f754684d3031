"""A training step on the card against the same model in plain Flax nnx.

Both steps (forward, backward, AdamW) are compiled whole and take their state's memory. Activations
are bfloat16, weights and moments float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import wsekern as wk
from benchmarks import harness
from benchmarks.flax_decoder import FlaxDecoder
from benchmarks.on_card.race import race
from benchmarks.on_card.session import Session
from benchmarks.on_card.weights import random_weights
from models.config import DecoderConfig
from models.decoder import Decoder
from models.presets import find_preset
from training.step import state_of, train_step

_PEER = "flax"
_DTYPE = "bfloat16"
# preset -> (sequences in a step, tokens in a sequence, seconds to compile and time one candidate)
_SIZES = {"125m": (32, 1024, 20.0), "1b": (8, 2048, 35.0)}
_ROOMY = 90e9  # bytes of memory that the sizes above are for; half the batch where there is less


def run(session: Session) -> None:
    """Races the presets 125m and 1b; where sizes are tiny, nano."""
    sizes = {"nano": (2, 64, 35.0)} if session.small else _SIZES
    for preset, (batch, context, cost) in sizes.items():
        config = dataclasses.replace(find_preset(preset), context=context)
        if not session.small and _memory() < _ROOMY:
            batch //= 2
        candidates = {
            _PEER: functools.partial(_flax, config, batch),
            "wsekern": functools.partial(_ours, config, batch, lambda: None),
        }
        if preset != "1b":
            one_pe = functools.partial(wk.Wafer.devices, 1, 1)
            candidates["wsekern, 1x1"] = functools.partial(_ours, config, batch, one_pe)
        race(
            session,
            f"{preset}, {batch} x {context} tokens, {_DTYPE}",
            candidates,
            peer=_PEER,
            work=batch * context,
            unit="tokens/s",
            ceiling=session.ceilings.peak,
            per_work=config.flops_per_token(context),
            cost=cost,
        )


def _memory() -> float:
    """Bytes of the card that jax may use."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit", 0.0)


def _ours(
    config: DecoderConfig, batch: int, make_wafer: Callable[[], wk.Wafer | None]
) -> harness.CompiledProgram:
    optimizer = optax.adamw(1e-3)
    graph, shapes = nnx.split(Decoder.shapes(config, dtype=_DTYPE))
    state = state_of(random_weights(shapes, config.init_std, "float32"), optimizer)
    step = train_step(graph, optimizer)
    wafer = make_wafer()
    if wafer is None:
        return harness.compile_in_place(step, state, *_tokens(config, batch))
    with wafer:
        return harness.compile_in_place(step, state, *_tokens(config, batch))


def _flax(config: DecoderConfig, batch: int) -> harness.CompiledProgram:
    optimizer = optax.adamw(1e-3)
    make = functools.partial(FlaxDecoder, config, dtype=_DTYPE)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    params = random_weights(shapes, config.init_std, "float32")

    def step(state: Any, inputs: Any, targets: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(inputs).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = params, optimizer.init(params)
    return harness.compile_in_place(step, state, *_tokens(config, batch))


def _tokens(config: DecoderConfig, batch: int) -> list[jax.Array]:
    drawn = np.random.default_rng(0).integers(0, config.vocab, (batch, config.context + 1))
    return [jnp.asarray(t, jnp.int32) for t in (drawn[:, :-1], drawn[:, 1:])]
