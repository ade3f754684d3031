"""Weights of eight and four bits: the time of a decoding step, and what rounding loses.

A step takes one token of each row through all layers, scanned, and the head; it has no cache, whose
time is the same for every kind of weight. The ratio is to float32. With --model, the loss of a real
checkpoint on a text is measured too, against the same checkpoint in float32. Command:
`python -m benchmarks quantized`
"""

import dataclasses
import pathlib
from typing import Any

import tyro

from benchmarks import harness

_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int8, activations int8": {"weights": "int8", "activations": "int8"},
    "int8, activations int16": {"weights": "int8", "activations": "int16"},
    "int4": {"weights": "int4"},
}
_BASELINE = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedOptions:
    """Time steps of random models, and measure the loss of a real one."""

    sizes: tuple[str, ...] = ("42m", "smollm2-135m")
    """Sizes of random models: 42m, or names of presets."""
    rows: tuple[int, ...] = (2, 8, 32)
    """Sequences in a step; a single one is padded to 2."""
    model: str | None = None
    """A checkpoint whose loss is measured; None: only times."""
    text: pathlib.Path = pathlib.Path(__file__).parent.parent / "docs" / "models.md"
    """The text that the checkpoint reads."""
    length: int = 256
    """Tokens that it reads at once."""
    rounds: int = 15
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table of times for each size and row count, and one of losses."""
    options = tyro.cli(QuantizedOptions, prog="python -m benchmarks quantized", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    for size in options.sizes:
        candidates = _models(size)
        for rows in options.rows:
            title = f"{size}: a step of {rows} rows"
            runs = {name: _step(model, rows) for name, model in candidates.items()}
            notes = {name: f"{_megabytes(model):,.0f} MB" for name, model in candidates.items()}
            results = harness.compare(runs, _BASELINE, rounds=options.rounds, notes=notes)
            harness.show(title, results)
            tables[title] = results
    losses = {} if options.model is None else _losses(options.model, options)
    if options.json:
        harness.dump(options.json, tables, {"losses": losses})


def _models(size: str) -> dict[str, Any]:
    """A random model with each kind of weight, by name."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import models
    from benchmarks.generate import SIZES

    preset = "125m" if size in SIZES else size
    config = dataclasses.replace(models.find_preset(preset), **SIZES.get(size, {}), tied=True)
    floats = models.Decoder(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(floats)
    half = nnx.merge(graph, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    quantized = {name: models.quantize(floats, **kind) for name, kind in _KINDS.items()}
    return {_BASELINE: floats, "bfloat16, widened": half} | quantized


def _step(model: Any, rows: int) -> harness.CompiledProgram:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    graph, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (rows, 1))

    def step(state: Any, tokens: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graph, state)(tokens)[:, 0], -1)

    return harness.compile_program(step, state, jnp.asarray(tokens, jnp.int32))


def _megabytes(model: Any) -> float:
    from flax import nnx

    from models.checkpoints.slots import bytes_of

    return bytes_of(nnx.state(model)) / 1e6


def _losses(checkpoint: str, options: QuantizedOptions) -> dict[str, Any]:
    """What each kind loses, by name; prints it."""
    import models

    tokens = models.load_tokenizer(checkpoint).encode(options.text.read_text(encoding="utf-8"))
    floats = _logprobs(models.load(checkpoint), tokens, options.length)
    losses = {}
    kinds = _KINDS | {"stored": {"weights": "stored"}}
    harness.console().print(f"\n{checkpoint}, {len(tokens):,} tokens of {options.text.name}\n")
    for name, kind in kinds.items():
        model = models.load(checkpoint, **kind)
        logprobs = _logprobs(model, tokens, options.length)
        losses[name] = loss = compare_logprobs(floats, logprobs, tokens, options.length)
        harness.console().print(
            f"{name:24} {_megabytes(model):6.0f} MB  divergence {loss['divergence']:.5f} nats, "
            f"perplexity {loss['perplexity']:.3f} ({loss['perplexity_change']:+.2%}), "
            f"same likeliest token {loss['same']:.1%}",
            highlight=False,
        )
    return losses


def _logprobs(model: Any, tokens: list[int], length: int) -> list[Any]:
    """The log-probabilities after each token, of pieces of `length` tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    graph, state = nnx.split(model)

    @jax.jit
    def read(state: Any, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(nnx.merge(graph, state)(tokens)[0])

    pieces = (tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length))
    return [np.asarray(read(state, jnp.asarray([piece], jnp.int32))) for piece in pieces]


def compare_logprobs(
    floats: list[Any], others: list[Any], tokens: list[int], length: int
) -> dict[str, float]:
    """Divergence in nats, perplexity and its change, and the share of equal likeliest tokens.

    Args:
      floats: log-probabilities `[length, V]` after each token of each piece of the text.
      others: those of the model that is compared.
      tokens: of the text.
      length: of a piece, in tokens.
    """
    import numpy as np

    divergences, same, losses, of_floats = [], [], [], []
    for i, (p, q) in enumerate(zip(floats, others, strict=True)):
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        followers = np.arange(length - 1), tokens[i * length + 1 : (i + 1) * length]
        losses.append(-q[followers])
        of_floats.append(-p[followers])
    loss, least = float(np.mean(losses)), float(np.mean(of_floats))
    return {
        "divergence": float(np.mean(divergences)),
        "perplexity": float(np.exp(loss)),
        "perplexity_change": float(np.expm1(loss - least)),
        "same": float(np.mean(same)),
    }
