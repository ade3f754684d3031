"""Attention on a grid against jit with shardings, the public ring attention, and one device.

The sequence is split along y and the heads along x. Every candidate computes the same attention and
is compiled first; then all run in turn. The ratio is to `jax.nn.dot_product_attention` under
`jax.jit` with the same shardings. Command: `python -m benchmarks attention --grid 2x4`
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness, public_ring
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Time attention with the sequence split along y, the heads along x, and the batch whole."""

    grid: tuple[str, ...] = ("8x1", "2x4")
    """Grids of emulated devices, HEIGHTxWIDTH."""
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    """Tokens in a sequence."""
    batch: int = 1
    """Sequences in a batch."""
    heads: int = 8
    """Heads of the queries."""
    kv_heads: int | None = None
    """Heads of keys and values. None: as many as the queries have."""
    head_size: int = 64
    """Features of a head."""
    causal: bool = True
    """Whether a token sees only the tokens before it."""
    window: int | None = None
    """How many keys a token sees. None: all of them."""
    algorithms: tuple[str, ...] = ("ring", "allgather", "auto")
    """Algorithms of `wk.attention` to time."""
    backward: bool = False
    """Include the gradients of queries, keys and values."""
    layers: int | None = None
    """Time the gradient of this many layers in a scan, as in training, instead of one call."""
    dtype: str = "float32"
    """Dtype of the operands."""
    rounds: int = 11
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each grid and length."""
    options = tyro.cli(AttentionOptions, prog="python -m benchmarks attention", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for length in options.lengths:
            title = _title(grid, length, options)
            candidates, notes = _candidates(grid, length, options)
            results = harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)
            harness.show(title, results)
            tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _title(grid, length, options):
    kv_heads = options.kv_heads or options.heads
    passes = "forward and backward" if options.backward else "forward"
    if options.layers:
        passes = f"gradient of {options.layers} layers"
    return (
        f"{'causal' if options.causal else 'full'} attention on {grid[0]}x{grid[1]}: "
        f"B={options.batch} T={length} N={options.heads} K={kv_heads} H={options.head_size}, "
        f"{options.dtype}, {passes}"
    )


def _candidates(grid, length, options):
    import jax
    from jax.sharding import PartitionSpec as P

    import wsekern as wk

    wafer = wk.Wafer.devices(*grid)
    layout = wafer.sharding(P(None, "y", "x", None))
    heads = (options.heads, options.kv_heads or options.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    whole = [
        jax.random.normal(key, (options.batch, length, n, options.head_size), options.dtype)
        for key, n in zip(keys, (*heads, *heads[::-1]), strict=True)
    ]
    plain = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=options.causal,
        local_window_size=None if options.window is None else (options.window - 1, 0),
    )

    def laid_out(q, k, v):
        return jax.lax.with_sharding_constraint(plain(q, k, v), layout)

    def case(attention, operands, **shardings):
        function, used = _function_to_time(attention, options)
        return harness.compile_program(function, *operands[:used], **shardings)

    tiled = [jax.device_put(x, layout) for x in whole]
    candidates = {"jit": case(laid_out, tiled, out_shardings=layout)}
    for algorithm in options.algorithms:
        attention = functools.partial(
            wk.attention,
            causal=options.causal,
            window=options.window,
            algorithm=algorithm,
            wafer=wafer,
        )
        candidates[algorithm] = case(attention, tiled, out_shardings=layout)
    comparable = heads[0] == heads[1] and options.window is None
    public = public_ring.find(wafer, options.causal) if comparable else None
    if public is not None:
        candidates["public ring"] = case(public, tiled, out_shardings=layout)
    if not (options.backward or options.layers):
        candidates["one device, blocked"] = case(
            functools.partial(one_device, causal=options.causal, window=options.window), whole
        )
    candidates["one device"] = case(plain, whole)
    return candidates, {
        "jit": "jax.nn.dot_product_attention, same shardings",
        "public ring": "the PyPI package ringattention",
        "one device, blocked": "our tiles in one loop, same cores",
        "one device": "jax.nn.dot_product_attention, same cores",
    }


def one_device(q: Any, k: Any, v: Any, *, causal: bool, window: int | None) -> Any:
    """Attention in blocks on one device, without blocks that no query sees: our work, no moves."""
    from wsekern.kernels.attention import tile
    from wsekern.kernels.attention.mask import Keys, Rows, Rule

    blocks, heads = -(-q.shape[1] // 512), k.shape[2]
    rows = tile.block_queries(q * q.shape[-1] ** -0.5, heads, blocks)
    kv = tile.block_keys(k, v, blocks)
    rule = Rule(scale=1.0, causal=causal, window=window, scores_at_once=512 * 512)
    keys = Keys(kv, tile.block_starts(kv, 0))
    softmax = tile.absorb(None, Rows(rows, tile.block_starts(rows, 0)), keys, rule)
    return tile.unblock_queries(tile.finish(softmax, None, q.dtype)[0])


def _function_to_time(attention: Callable, options: AttentionOptions) -> tuple[Callable, int]:
    """The function to time, and how many of q, k, v and the result's gradient it takes."""
    import jax
    import jax.numpy as jnp

    def both(q, k, v, dout):
        out, gradients = jax.vjp(attention, q, k, v)
        return out, gradients(dout)

    def loss(q, k, v):
        def layer(x, _):
            return x + attention(x, k, v), None

        return jnp.sum(jax.lax.scan(layer, q, length=options.layers)[0] ** 2)

    if options.layers:
        return jax.grad(loss, argnums=(0, 1, 2)), 3
    return (both, 4) if options.backward else (attention, 3)
