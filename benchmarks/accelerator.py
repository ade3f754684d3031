"""A training step on one device against the same model in plain Flax, and its share of the peak.

Both steps (forward, backward, AdamW) are compiled whole, then run in turn; the ratio is to Flax.
The table adds tokens per second, and FLOP/s over the device's peak. On a GPU: `JAX_PLATFORMS=cuda
python -m benchmarks accelerator`
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any

import tyro

from benchmarks import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorOptions:
    """Time a training step (AdamW) on one device against the same model in plain Flax."""

    preset: str = "125m"
    """A Llama-like preset with a tied head."""
    batch: int = 8
    """Sequences in a step."""
    context: int | None = None
    """Tokens in a sequence. None: the preset's context."""
    dtype: str = "bfloat16"
    """Dtype of the arithmetic; weights and moments are float32."""
    rounds: int = 15
    """How often each candidate is timed."""
    json: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the results to this file, as JSON."""


def main(argv: list[str]) -> None:
    """Runs the benchmark with the options in `argv`."""
    options = tyro.cli(AcceleratorOptions, prog="python -m benchmarks accelerator", args=argv)
    harness.start(1)
    harness.show_environment()
    import wsekern as wk
    from models.presets import find_preset
    from training.header import find_peak

    preset = find_preset(options.preset)
    config = dataclasses.replace(preset, context=options.context or preset.context)
    tokens = options.batch * config.context
    flops = tokens * config.flops_per_token(config.context)
    peak = find_peak(wk.Wafer.devices(1, 1), options.dtype)
    results = harness.compare(_candidates(config, options), "flax", rounds=options.rounds)
    title = (
        f"train step, {options.preset}, {options.batch} x {config.context}, {options.dtype}; "
        f"peak {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})"
    )
    columns = {
        "tokens/s": lambda result: f"{tokens / result.seconds:,.0f}",
        "of peak": lambda result: f"{flops / result.seconds / peak.flops:.1%}",
    }
    harness.show(title, results, columns)
    if options.json is not None:
        harness.dump(options.json, {title: results})


def _candidates(config: Any, options: AcceleratorOptions) -> dict[str, harness.CompiledProgram]:
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from benchmarks.flax_decoder import FlaxDecoder
    from models.decoder import Decoder
    from training.step import initial_state, train_step

    optimizer = optax.adamw(1e-3)
    drawn = np.random.default_rng(0).integers(0, config.vocab, (options.batch, config.context + 1))
    pair = [jax.numpy.asarray(t, np.int32) for t in (drawn[:, :-1], drawn[:, 1:])]

    def ours() -> harness.CompiledProgram:
        make_model = functools.partial(_make, Decoder, config, options.dtype)
        graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
        state = jax.jit(lambda: initial_state(make_model, optimizer, 0))()
        return harness.compile_program(train_step(graph, optimizer), state, *pair)

    def flax() -> harness.CompiledProgram:
        make_model = functools.partial(_make, FlaxDecoder, config, options.dtype)
        graph, params = nnx.split(make_model(nnx.Rngs(0)))

        def step(params, moments, inputs, targets):
            def loss(params):
                logits = nnx.merge(graph, params)(inputs).astype(jax.numpy.float32)
                return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

            value, gradients = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradients, moments, params)
            return optax.apply_updates(params, updates), moments, value

        return harness.compile_program(step, params, optimizer.init(params), *pair)

    return {"flax": flax(), "wsekern": ours()}


def _make(model: Any, config: Any, dtype: str, rngs: Any) -> Any:
    return model(config, rngs=rngs, dtype=dtype)
