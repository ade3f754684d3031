"""One training step on a grid of devices against the same model under jit alone, and one device.

The peer is the same model in plain jnp under `jax.jit`, with the same layout of parameters and
optimizer state. It is compiled once for each sensible way to constrain its activations; a short
race finds the fastest, and the others are then timed in turn with that one as the baseline.
Command: `python -m benchmarks train_step`
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any

import tyro

from benchmarks import harness
from wsekern.wafer.launch import parse_height_width

# name -> (changes to the nano preset, sequences in a batch); the context is the preset's
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "nano": ({}, 12),
    "width512": (
        {"d_model": 512, "d_ff": 1536, "layers": 8, "heads": 8, "kv_heads": 8, "context": 256},
        4,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStepOptions:
    """Time a training step (AdamW, float32): ours, jit alone, and one device."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """Models: nano (4 layers of 128, batch 12 x 64), width512 (8 layers of 512, batch 4 x 256)."""
    grid: str = "2x4"
    """Grid of devices, HEIGHTxWIDTH."""
    rounds: int = 15
    """How often each candidate is timed."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the results to this file, as JSON."""


def main(argv: list[str]) -> None:
    """Runs the benchmark with the options in `argv`."""
    options = tyro.cli(TrainStepOptions, prog="python -m benchmarks train_step", args=argv)
    height, width = parse_height_width(options.grid)
    harness.start(height * width)
    harness.show_environment()
    tables = {}
    for size in options.sizes:
        title = f"train step, {size}, {options.grid}: ratio of times to jit alone"
        tables[title] = _measure(size, height, width, options.rounds)
        harness.show(title, tables[title], {"tokens/s": functools.partial(_tokens_per_s, size)})
    if options.json is not None:
        harness.dump(options.json, tables, {"options": dataclasses.asdict(options) | {"json": ""}})


def _measure(size: str, height: int, width: int, rounds: int) -> list[harness.Timing]:
    candidates = _candidates(size, height, width)
    alone = [name for name in candidates if name.startswith("jit alone")]
    # A short race finds the best constraints, which are the baseline of the long one.
    race = harness.compare({name: candidates[name] for name in alone}, alone[0], rounds=5)
    best = min(race, key=lambda result: result.ratio).name
    racers = {best: candidates[best]} | {n: c for n, c in candidates.items() if n not in alone}
    return harness.compare(racers, best, rounds=rounds)


def _candidates(size: str, height: int, width: int) -> dict[str, harness.CompiledProgram]:
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from benchmarks import plain_decoder
    from models.decoder import Decoder
    from models.families.llama import NANO
    from sharding.state import initialize, lay_out
    from training.step import apply_gradients, initial_state, train_step

    changes, batch = SIZES[size]
    config = dataclasses.replace(NANO, **changes)
    wafer = wk.Wafer.devices(height, width)
    optimizer = optax.adamw(1e-3)

    def make_model(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config, rngs=rngs)

    def make_state() -> Any:
        return initial_state(make_model, optimizer, 0)

    def plain_step(constrain: plain_decoder.Constrain) -> Any:
        def step(state, inputs, targets):
            loss, gradients = jax.value_and_grad(plain_decoder.loss)(
                state["params"], inputs, targets, config, constrain
            )
            return apply_gradients(optimizer, state, loss, gradients)

        return step

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, config.context + 1))
    pair = (tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32))
    state, alone = initialize(make_state, wafer), initialize(make_state, None)
    shared = [wafer.shard(t, P(None, "y")) for t in pair]
    out = {"out_shardings": (lay_out(state, wafer), wafer.sharding(P()))}
    with wafer:
        ours = harness.compile_program(train_step(graph, optimizer), state, *shared, **out)
    candidates = {
        f"jit alone, {name}": harness.compile_program(
            plain_step(functools.partial(_constrain, wafer, specs)), state, *shared, **out
        )
        for name, specs in plain_decoder.CONSTRAINTS.items()
    }
    one = harness.compile_program(plain_step(lambda x, _: x), alone, *map(jax.numpy.asarray, pair))
    return candidates | {"wsekern": ours, "one device": one}


def _constrain(wafer: Any, specs: dict[str, Any], x: Any, kind: str) -> Any:
    return wafer.shard(x, specs[kind]) if kind in specs else x


def _tokens_per_s(size: str, result: harness.Timing) -> str:
    changes, batch = SIZES[size]
    return f"{batch * changes.get('context', 64) / result.seconds:,.0f}"
