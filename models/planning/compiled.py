"""Compile a model's real programs for chips that need not be there: `models plan --target`.

Decoding is one step with a full cache, prefill a pass over whole prompts that fills one. Training
is compiled by `python -m training --compile-only`, which knows the optimizer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

import wsekern as wk
from models.arguments import PlanCommand
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generation import decode, prefill
from models.sampling import Sampling
from sharding.state import unpadded_sharding
from wsekern.compiler.search import compare_wafers, search_batch
from wsekern.estimator.pictures import output
from wsekern.kernels.attention.kv_cache import SEQUENCES, SLOTS
from wsekern.progress import show_progress
from wsekern.wafer.launch import make_topology

_CONTEXT = 4096  # tokens, unless the command says how many


def run(command: PlanCommand, config: DecoderConfig) -> int:
    """Prints what the compiler makes of a model's program; returns 0 if it fits, 1 if not.

    Raises:
      ValueError: the mode is "train", the topology is unknown, or a grid does not fit it.
      ImportError: the compiler of these chips is not installed.
    """
    assert command.target is not None
    if command.mode == "train":
        raise ValueError(
            "mode='train': the step with its optimizer is compiled by `python -m training "
            f"--compile-only --target {command.target} --preset {command.model}`"
        )
    if command.html is not None:
        output.check_writable(command.html)
    batch = 1 if command.batch is None else command.batch
    grids = command.layouts or (None,)
    wafers = {grid or "": make_topology(command.target, grid) for grid in grids}
    wafer = next(iter(wafers.values()))
    compile_on = functools.partial(_compile, command, config)
    text, shown = "", None
    if len(wafers) > 1:
        text, shown = compare_wafers(lambda wafer: compile_on(wafer, batch), wafers)
    elif command.largest_batch:
        text, shown = search_batch(functools.partial(compile_on, wafer), batch, wafer.wafers)
    else:
        shown = compile_on(wafer, batch)
    if command.json and shown is not None:
        print(json.dumps(shown.as_json(), indent=2))
    else:
        print(*filter(None, (text, shown)), sep="\n")
    if shown is not None and command.html is not None:
        shown.html(command.html)
        print(f"written to {command.html}", file=sys.stderr)
    return 0 if shown is not None and shown.fits else 1


def _compile(
    command: PlanCommand, config: DecoderConfig, wafer: wk.Wafer, batch: int
) -> wk.Compilation:
    context = command.context or min(config.context, _CONTEXT)
    function, shapes = program(config, wafer, command.mode, batch, context)
    grid = "x".join(map(str, wafer.grid))
    of = {"decode": "one token, cache of", "prefill": "prompts of"}[command.mode]
    name = f"{command.model}: {batch} sequences, {of} {context} tokens, bfloat16"
    with show_progress(f"python -m models plan: compiling for {command.target}, {grid}"):
        donated = (1,) if command.mode == "decode" else ()
        return wk.compile(function, *shapes, wafer=wafer, name=name, donate_argnums=donated)


def program(
    config: DecoderConfig, wafer: wk.Wafer, mode: str, batch: int, context: int
) -> tuple[Any, tuple[Any, ...]]:
    """The function of a decode step or of a prefill, and the shapes of its operands on a wafer.

    Args:
      config: the model's.
      wafer: to lay the weights and the cache out on.
      mode: "decode" or "prefill".
      batch: sequences.
      context: tokens that the cache has room for; of the prompts in prefill.
    """
    config = dataclasses.replace(config, stacked=False)
    graph, shapes = nnx.split(Decoder.shapes(config, dtype=jnp.bfloat16))

    def narrow(leaf: nnx.Variable) -> nnx.Variable:
        sharding = unpadded_sharding(leaf, wafer)
        shape = leaf.get_value().shape
        return leaf.replace(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding))

    params = jax.tree.map(narrow, shapes, is_leaf=lambda v: isinstance(v, nnx.Variable))
    inside = None if wafer.size == 1 else wafer
    whole = wafer.sharding(P())
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=whole)
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=whole)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    ends = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=whole)
    greedy = Sampling()

    def run_prefill(params: Any, tokens: Any, lengths: Any, key: Any, ends: Any) -> Any:
        return prefill(graph, params, tokens, lengths, key, ends, greedy, context, inside)

    if mode == "prefill":
        return run_prefill, (params, tokens, lengths, key, ends)

    def run_decode(params: Any, state: Any, key: Any, ends: Any) -> Any:
        return decode(graph, params, state, key, ends, greedy, inside)

    with wafer:
        state, _ = jax.eval_shape(run_prefill, params, tokens, lengths, key, ends)
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state
    )
    if inside is not None:
        caches = [lay_out_cache(cache, wafer) for cache in state.caches]
        state = dataclasses.replace(state, caches=caches)
    return run_decode, (params, state, key, ends)


def lay_out_cache(cache: wk.KVCache, wafer: wk.Wafer) -> wk.KVCache:
    """The shapes of a cache with the shardings that it has on a wafer."""

    def shape(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wafer.sharding(spec))

    return dataclasses.replace(
        cache,
        k=shape(cache.k, SLOTS),
        v=shape(cache.v, SLOTS),
        lengths=shape(cache.lengths, SEQUENCES),
    )
