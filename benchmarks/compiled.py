"""What compilers of accelerators make of our programs and of jit alone; no chip is needed.

Nothing runs: `wk.compile` reads temporaries, transfers, kernels and a modelled time off the
compiled schedule. Each program stands beside jit alone with the same layouts, and beside the public
kernel of the field where that compiles. Command: `python -m benchmarks compiled --target v5e:4x4
v6e:4x4`
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.table import Table

from benchmarks import compiled_products, harness
from wsekern.progress import show_progress

if TYPE_CHECKING:
    from wsekern.compiler.result import Compilation
    from wsekern.wafer.wafer import Wafer

PROGRAMS = ("products", "algorithms", "attention", "decode", "layers", "stencil", "training")
Candidate = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # function, shapes, options
# preset -> sequences in a step on 16 chips, tokens in each, and whether layers are recomputed
_STEPS = {"125m": (32, 1024, False), "1b": (32, 2048, True), "8b": (16, 2048, True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledOptions:
    """Compile products, attention, decoding, a stencil and training steps for chips."""

    target: tuple[str, ...] = ("v5e:4x4",)
    """Chips: v5e:4x4, v6e:4x4, v5p:4x4x4, h100:2x4 ..."""
    only: tuple[str, ...] = PROGRAMS
    """Which programs: products, algorithms, attention, decode, layers, stencil, training."""
    products: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Sides of the square matrices, in bfloat16."""
    lengths: tuple[int, ...] = (8192, 32768)
    """Tokens that attention and decoding have."""
    presets: tuple[str, ...] = tuple(_STEPS)
    """Models of the training steps."""
    context: int | None = None
    """Tokens of a sequence in the training steps. None: 1024 for 125m, else 2048."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the results to this file, as JSON."""

    def __post_init__(self) -> None:
        for name, given, known in (
            ("only", self.only, PROGRAMS), ("presets", self.presets, tuple(_STEPS))
        ):  # fmt: skip
            for one in given:
                if one not in known:
                    raise ValueError(f"{name}={one!r} is not one of {', '.join(known)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context} must be 1 or more")


def main(argv: list[str]) -> None:
    """Prints a table for each target and program, and writes the JSON."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no device of this machine is needed
    try:
        options = tyro.cli(CompiledOptions, prog="python -m benchmarks compiled", args=argv)
        from wsekern.wafer.wafer import Wafer

        wafers = {target: Wafer.topology(target) for target in options.target}
    except (ValueError, ImportError) as error:
        raise SystemExit(f"benchmarks compiled: {error}") from None
    results: dict[str, dict[str, Any]] = {}
    for target, wafer in wafers.items():
        for title, candidates in _programs(target, wafer, options):
            compiled = {}
            for name, make in candidates.items():
                with show_progress(f"{target}: {title}, {name}"):
                    compiled[name] = _compile(make, wafer)
            _show(f"{target}: {title}", compiled)
            results[f"{target}: {title}"] = {
                name: one if isinstance(one, str) else one.as_json()
                for name, one in compiled.items()
            }
            if options.json is not None:  # after each program: the next may take minutes
                options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _programs(
    target: str, wafer: Wafer, options: CompiledOptions
) -> Iterator[tuple[str, dict[str, Callable[[], Candidate]]]]:
    """Titles of programs, with the candidates for each; the first one is the baseline."""
    makers = {
        "products": lambda: compiled_products.programs(wafer, options.products),
        "algorithms": lambda: compiled_products.algorithms(wafer),
        "attention": lambda: _attention(wafer, options.lengths),
        "decode": lambda: _decode(wafer, options.lengths),
        "layers": lambda: _layers(wafer),
        "stencil": lambda: _stencil(wafer),
        "training": lambda: _training(target, wafer, options.presets, options.context),
    }
    for name in options.only:
        yield from makers[name]()


def _compile(make: Callable[[], Candidate], wafer: Wafer) -> Compilation | str:
    """The compilation, or the first line of why there is none."""
    import wsekern as wk

    try:
        function, shapes, options = make()
        given: dict[str, Any] = {"wafer": wafer, "roofline": False} | options
        return wk.compile(function, *shapes, **given)
    except Exception as error:  # a public kernel that refuses the sizes must not end the table
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"


def _attention(wafer: Wafer, lengths: tuple[int, ...]) -> Iterator[Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from benchmarks import public_ring, public_splash

    split = wafer.sharding(P(None, "y", "x", None))
    alone = functools.partial(jax.nn.dot_product_attention, is_causal=True)

    def constrained(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(alone(q, k, v), split)

    for length in lengths:
        q = jax.ShapeDtypeStruct((1, length, 32, 128), jnp.bfloat16, sharding=split)
        k = jax.ShapeDtypeStruct((1, length, 8, 128), jnp.bfloat16, sharding=split)
        ours: dict[str, Callable] = {
            f"wk.attention {name}": functools.partial(wk.attention, causal=True, algorithm=name)
            for name in ("auto", "ring", "ulysses", "allgather")
        }
        text = f"causal attention, {length} tokens, 32 heads (8 of keys) of 128"
        peers: dict[str, Callable] = {"jit alone": constrained}
        if wafer.platform == "tpu":
            peers["JAX's splash attention"] = public_splash.find(wafer, length, 32, 8)
        if (ring := public_ring.find(wafer, causal=True)) is not None:
            peers["ringattention"] = functools.partial(_with_all_heads, ring)
        functions = peers | ours
        yield (
            text,
            {name: lambda f=f, q=q, k=k: (f, (q, k, k), {}) for name, f in functions.items()},
        )
        yield (
            f"{text}, gradient",
            {
                name: lambda f=f, q=q, k=k: (compiled_products.gradient(f), (q, k, k, q), {})
                for name, f in functions.items()
            },
        )


def _with_all_heads(function: Callable, q: Any, k: Any, v: Any) -> Any:
    """Attention with keys and values repeated for the queries that share a head of them."""
    import jax.numpy as jnp

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return function(q, k, v)


def _decode(wafer: Wafer, lengths: tuple[int, ...]) -> Iterator[Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from models.planning.compiled import lay_out_cache

    def ours(cache: wk.KVCache, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        cache = cache.append(k, v)
        return wk.decode_attention(q, cache), cache

    def alone(ks: jax.Array, vs: jax.Array, at: jax.Array, q: jax.Array, k: jax.Array) -> Any:
        ks, vs = (jax.lax.dynamic_update_slice(c, k, (0, at, 0, 0)) for c in (ks, vs))
        lengths = jnp.full(q.shape[0], at + 1)
        out = jax.nn.dot_product_attention(q, ks, vs, key_value_seq_lengths=lengths)
        return out, ks, vs

    for length in lengths:
        batch = 8
        keys = jax.ShapeDtypeStruct(
            (batch, length, 8, 128), jnp.bfloat16, sharding=wafer.sharding(P(None, "y", "x"))
        )
        heads = wafer.sharding(P(None, None, "x"))
        q = jax.ShapeDtypeStruct((batch, 1, 32, 128), jnp.bfloat16, sharding=heads)
        k = jax.ShapeDtypeStruct((batch, 1, 8, 128), jnp.bfloat16, sharding=heads)
        at = jax.ShapeDtypeStruct((), jnp.int32)

        def cache(keys: Any = keys) -> Any:
            B, S, K, H = keys.shape
            sizes = {"batch": B, "capacity": S, "kv_heads": K, "head_size": H, "heads": 32}
            empty = functools.partial(wk.KVCache.empty, **sizes, dtype=jnp.bfloat16, wafer=wafer)
            return lay_out_cache(jax.eval_shape(empty), wafer)

        yield f"decoding, {batch} sequences, room for {length}", {
            "jit alone": lambda keys=keys, q=q, k=k, at=at: (
                alone, (keys, keys, at, q, k), {"donate_argnums": (0, 1)}
            ),
            "wk.decode_attention": lambda q=q, k=k, cache=cache: (
                ours, (cache(), q, k, k), {"donate_argnums": (0,)}
            ),
        }  # fmt: skip


def _layers(wafer: Wafer) -> Iterator[Any]:
    from benchmarks import plain_layers

    sizes = {"batch": 8, "tokens": 4096, "features": 4096, "vocabulary": 128256}
    for case in plain_layers.cases(wafer, **sizes):
        functions = {"jit alone": case.plain, f"wk.{case.name}": case.ours}
        text = f"{case.title}, 8 x 4096 tokens, 4096 features"
        yield text, {name: lambda f=f, c=case: (f, c.operands, {}) for name, f in functions.items()}
        yield (
            f"{text}, gradient",
            {
                name: lambda f=f, c=case: (
                    compiled_products.gradient(f, c.differentiable),
                    (*c.operands, c.result(wafer)),
                    {},
                )
                for name, f in functions.items()
            },
        )


def _stencil(wafer: Wafer) -> Iterator[Any]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from benchmarks import plain_stencil, public_halo

    field = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=wafer.sharding(P("y", "x")))
    for name in ("5-point", "9-point"):
        update = plain_stencil.UPDATES[name]
        roll = functools.partial(plain_stencil.step_by_roll, name=name, steps=100)
        ours = functools.partial(
            wk.stencil, update=update, radius=1, boundary="periodic", steps=100
        )
        functions: dict[str, Callable] = {"jnp.roll under jit": roll}
        if (public := public_halo.step_by_exchange(wafer, name, 100, 1)) is not None:
            functions["jaxdecomp"] = public
        functions["wk.stencil"] = ours
        candidates = {
            candidate: lambda f=f: (f, (field,), {"donate_argnums": (0,)})
            for candidate, f in functions.items()
        }
        yield f"{name} stencil, 8192^2, 100 steps", candidates


def _training(
    target: str, wafer: Wafer, presets: tuple[str, ...], context: int | None
) -> Iterator[Any]:
    from jax.sharding import PartitionSpec as P

    from benchmarks import plain_decoder
    from wsekern.wafer.axes import WAFERS
    from wsekern.wafer.wafer import Wafer

    for preset in presets:
        batch, usual, remat = _STEPS[preset]
        batch = max(batch * wafer.size // 16, 1)
        constraints = {name: specs for name, specs in plain_decoder.CONSTRAINTS.items() if specs}
        kinds = ("residual", "gathered", "wide", "heads")
        if batch % wafer.width == 0:
            constraints["sequences over x"] = dict.fromkeys(kinds, P("x", "y"))
        if batch % wafer.size == 0:
            constraints["sequences over both"] = dict.fromkeys(kinds, P(("y", "x")))
        sizes = (preset, batch, context or usual, remat)
        candidates: dict[str, Callable[[], Candidate]] = {
            f"jit alone, {name}": functools.partial(_plain_step, wafer, specs, *sizes)
            for name, specs in constraints.items()
        }
        candidates["wsekern"] = functools.partial(_our_step, wafer, *sizes)
        if batch % wafer.size == 0:
            # Each chip as a wafer of its own: whole features, and a share of the batch.
            apart = Wafer.topology(target, 1, 1, wafer.size)
            split = f"{wafer.size}x1x1, state split"
            rows = dict.fromkeys(kinds, P(WAFERS))
            for name, specs in {split: rows, f"{split}, gathered": rows | {"weight": P()}}.items():
                candidates[f"jit alone, {name}"] = functools.partial(
                    _plain_step, apart, specs, *sizes, split_state=True
                )
            candidates[f"wsekern, {split}"] = functools.partial(
                _our_step, apart, *sizes, split_state=True
            )
        yield f"training step, {preset}, {batch} x {context or usual} tokens", candidates


def _plan(
    wafer: Wafer, preset: str, batch: int, context: int, remat: bool, split_state: bool
) -> Any:
    from models.presets import find_preset
    from training.config import TrainingConfig
    from training.plan import make_plan

    config = TrainingConfig(
        preset=preset,
        wafer="x".join(map(str, wafer.grid)),
        batch=batch,
        context=context,
        dtype="bfloat16",
        remat=remat,
        split_state=split_state,
    )
    return make_plan(config, find_preset(preset), wafer)


def _our_step(
    wafer: Wafer, preset: str, batch: int, context: int, remat: bool, split_state: bool = False
) -> Candidate:
    from training.programs import step_program

    function, shapes, options = step_program(
        _plan(wafer, preset, batch, context, remat, split_state)
    )
    return function, shapes, {**options, "wafer": wafer}


def _plain_step(
    wafer: Wafer,
    specs: dict[str, Any],
    preset: str,
    batch: int,
    context: int,
    remat: bool,
    split_state: bool = False,
) -> Candidate:
    import jax
    import jax.numpy as jnp

    from benchmarks import plain_decoder
    from training.programs import step_program
    from training.step import apply_gradients

    plan = _plan(wafer, preset, batch, context, remat, split_state)

    def constrain(x: jax.Array, kind: str) -> jax.Array:
        return wafer.shard(x, specs[kind]) if kind in specs else x

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return plain_decoder.loss(narrow, inputs, targets, plan.sizes, constrain, remat=remat)

    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(state["params"], inputs, targets)
        return apply_gradients(plan.optimizer, state, value, gradients)

    _, shapes, options = step_program(plan)
    return step, shapes, {**options, "wafer": wafer}


def _show(title: str, compiled: dict[str, Compilation | str]) -> None:
    from wsekern.compiler.report import seconds, size

    out = harness.console()
    table = Table(box=box.HEAVY_HEAD if out.is_terminal else box.MARKDOWN)
    table.add_column("candidate")
    for heading in ("modelled", "ratio", "cycles", "waited for", "hidden", "temporaries"):
        table.add_column(heading, justify="right")
    table.add_column("kernels")
    table.add_column("compile", justify="right")
    ran = [c for c in compiled.values() if not isinstance(c, str) and c.seconds]
    # Of several forms of jit alone the fastest is the baseline.
    alone = [c for name, c in compiled.items() if not name.startswith(("wk.", "wsekern"))]
    times = [c.seconds for c in alone if not isinstance(c, str) and c.seconds]
    best = min(times, default=None)
    for name, c in compiled.items():
        if isinstance(c, str):
            table.add_row(name, "-", "", "", "", "", "", c, "")
            continue
        if c.cost is None or c.seconds is None:
            table.add_row(name, "-", "", "", "", "", size(c.memory.total), c.why_no_schedule,
                          f"{c.compile_seconds:.1f} s")  # fmt: skip
            continue
        hidden = f"{1 - c.waited_bytes / c.sent_bytes:.0%}" if c.sent_bytes else "-"
        kernels = ", ".join(f"{k} x {n}" for k, n in sorted(c.kernels.items()))
        table.add_row(
            name,
            seconds(c.seconds),
            "-" if best is None else f"{c.seconds / best:.2f}",
            f"{c.cost.cycles:,.0f}",
            size(c.waited_bytes),
            hidden,
            size(c.memory.temporaries),
            kernels,
            f"{c.compile_seconds:.1f} s",
        )
    out.print(f"\n{title}\n", highlight=False)
    out.print(table)
    if not ran:
        out.print("none of these could be compiled", highlight=False)
