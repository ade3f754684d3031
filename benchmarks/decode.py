"""One token of decoding against jit with shardings and one device, and by length of the cache.

A step appends one token to every sequence and attends to all its tokens. The first table compares
candidates on a half-full cache; the ratio is to `jax.nn.dot_product_attention` under jit. The
second times a nearly empty, a half-full and a nearly full cache, which should cost the same: shapes
are static, so the capacity decides, and no row of PEs has more to do than another. Command: `python
-m benchmarks decode --grid 2x4`
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Time one step of decoding: the cache has its tokens along y and its heads along x."""

    grid: tuple[str, ...] = ("8x1", "2x4")
    """Grids of emulated devices, HEIGHTxWIDTH."""
    capacity: tuple[int, ...] = (4096,)
    """Tokens that the cache has room for in a sequence."""
    batch: int = 1
    """Sequences in a batch."""
    heads: int = 8
    """Heads of the queries."""
    kv_heads: int | None = None
    """Heads of keys and values. None: as many as the queries have."""
    head_size: int = 64
    """Features of a head."""
    dtype: str = "float32"
    """Dtype of the operands."""
    rounds: int = 11
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints two tables for each grid and capacity: against the peers, and by length."""
    options = tyro.cli(DecodeOptions, prog="python -m benchmarks decode", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for capacity in options.capacity:
            title = _title(grid, capacity, options)
            for part, results, columns in _results(grid, capacity, options):
                harness.show(f"{title}: {part}", results, columns)
                tables[f"{title}: {part}"] = results
    if options.json:
        harness.dump(options.json, tables)


def _title(grid, capacity, options):
    return (
        f"decoding on {grid[0]}x{grid[1]}: B={options.batch} N={options.heads} "
        f"K={options.kv_heads or options.heads} H={options.head_size}, room for {capacity}, "
        f"{options.dtype}"
    )


def _results(grid, capacity, options):
    """Each table: the end of its title, its results, and its further columns."""
    import wsekern as wk

    wafer = wk.Wafer.devices(*grid)
    half = capacity // 2
    lengths = {"near empty": 1, "half": half, "near full": capacity - 1}
    ours = functools.partial(_ours, capacity=capacity, options=options)
    peer = functools.partial(_peer, capacity=capacity, options=options)
    candidates = {
        "jit": peer(wafer, half),
        "jit, by head": peer(wafer, half, by_head=True),
        "wsekern": ours(wafer, half),
        "one device": peer(None, half),
        "one device, by head": peer(None, half, by_head=True),
        "wsekern, one device": ours(None, half),
    }
    notes = {
        "jit": "dynamic_update_slice, jax.nn.dot_product_attention",
        "jit, by head": "cache of [B, K, S, H], two einsums",
    }
    results = harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)
    yield "half full", results, {"temporaries of cache": lambda r: _share(candidates[r.name])}
    steps = {name: ours(wafer, length) for name, length in lengths.items()}
    steps |= {f"jit, {name}": peer(wafer, length) for name, length in lengths.items()}
    results = harness.compare(steps, "half", rounds=options.rounds)
    yield "by length", results, {"tokens in a row of PEs": lambda r: steps[r.name].rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CompiledStep(harness.CompiledProgram):
    cache_bytes: int  # on one device
    rows: str  # the fewest and the most tokens that a row of PEs holds


def _share(step: _CompiledStep) -> str:
    return "" if step.temp_bytes is None else f"{step.temp_bytes / step.cache_bytes:.1%}"


def _compile_step(
    step: Callable, cache: Any, operands: tuple, rows: tuple[int, int]
) -> _CompiledStep:
    """`step(cache, *operands)`, which returns the next cache first; the cache is donated."""
    import jax

    program = harness.compile_in_place(step, cache, *operands)
    return _CompiledStep(
        run=program.run,
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        cache_bytes=sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache)),
        rows=f"{rows[0]} to {rows[1]}",
    )


def _ours(wafer, length, capacity, options):
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk

    empty = wk.KVCache.empty(
        batch=options.batch,
        capacity=capacity,
        kv_heads=options.kv_heads or options.heads,
        heads=options.heads,
        head_size=options.head_size,
        dtype=options.dtype,
        wafer=wafer,
    )

    # `lengths` is not carried over, so every call times the same step.
    def step(kv, lengths, q, k, v):
        cache = dataclasses.replace(empty, k=kv[0], v=kv[1], lengths=lengths).append(k, v)
        return (cache.k, cache.v), wk.decode_attention(q, cache)

    balance, lengths = empty.balance, jnp.full(options.batch, length, jnp.int32)
    first = [int(balance.first(lengths + 1, row)[0]) for row in range(balance.rows + 1)]
    tokens_by_row = [b - a for a, b in zip(first, first[1:], strict=False)]
    lengths = lengths if wafer is None else wafer.shard(lengths, P())
    operands = (lengths, *_tokens(wafer, options))
    return _compile_step(
        step, (empty.k, empty.v), operands, (min(tokens_by_row), max(tokens_by_row))
    )


def _peer(wafer, length, capacity, options, by_head=False):
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    slots = 2 if by_head else 1
    layout = P(None, "x", "y", None) if by_head else P(None, "y", "x", None)
    shape = [options.batch, capacity, options.kv_heads or options.heads, options.head_size]
    shape[1:3] = reversed(shape[1:3]) if by_head else shape[1:3]
    attend: Callable = _attention_by_head if by_head else _attention_of_jax

    def laid_out(x):
        if wafer is None or wafer.width > shape[3 - slots]:  # heads are then whole
            return x
        return wafer.shard(x, layout)

    def step(kv, length, q, k, v):
        new = (x.swapaxes(1, slots) for x in (k, v))
        kv = tuple(
            laid_out(jax.lax.dynamic_update_slice_in_dim(old, token, length, slots))
            for old, token in zip(kv, new, strict=True)
        )
        return kv, attend(q, *kv, jnp.broadcast_to(length + 1, options.batch))

    cache = tuple(laid_out(jnp.zeros(shape, options.dtype)) for _ in range(2))
    rows = -(-capacity // (1 if wafer is None else wafer.height))
    tokens_by_row = (max(0, length + 1 - (capacity - rows)), min(length + 1, rows))
    return _compile_step(step, cache, (jnp.int32(length), *_tokens(wafer, options)), tokens_by_row)


def _attention_of_jax(q, k, v, lengths):
    import jax

    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def _attention_by_head(q, k, v, lengths):
    import jax
    import jax.numpy as jnp

    B, _, N, H = q.shape
    q = q.reshape(B, k.shape[1], -1, H)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type="float32") * H**-0.5
    seen = jnp.arange(k.shape[2])[None, None, None] < lengths[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(v.dtype), v).reshape(B, 1, N, H)


def _tokens(wafer, options):
    """Queries, keys and values of one new token, the same in every row of PEs."""
    import jax
    from jax.sharding import PartitionSpec as P

    heads = (options.heads, *[options.kv_heads or options.heads] * 2)
    whole = [
        jax.random.normal(key, (options.batch, 1, n, options.head_size), options.dtype)
        for key, n in zip(jax.random.split(jax.random.key(0), 3), heads, strict=True)
    ]
    if wafer is None:
        return whole
    return [
        wafer.shard(x, P(None, None, "x", None) if x.shape[2] % wafer.width == 0 else P())
        for x in whole
    ]
