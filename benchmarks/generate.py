"""Text from a model on one device: tokens per second against transformers and llama.cpp.

A random Llama continues random prompts greedily. A time is that of the whole call, reading the
prompts included; candidates run in turn, and the ratio is to ours. Command:
`python -m benchmarks generate`
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tyro

from benchmarks import harness

# name -> its differences from the preset 125m
SIZES: dict[str, dict[str, Any]] = {
    "42m": {"d_model": 512, "d_ff": 1376, "layers": 8, "heads": 8, "kv_heads": 8, "vocab": 32_000},
    "125m": {"vocab": 32_000},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Time greedy continuations of random prompts by a random Llama on one device.

    `transformers` is timed if it and torch are installed (the extra `parity`), llama.cpp if
    `llama-cpp-python` and gguf are; each uses as many threads as there are processors.
    """

    sizes: tuple[str, ...] = ("42m", "125m")
    """Sizes of the model: 42m, 125m."""
    batch: tuple[int, ...] = (1, 8)
    """Sequences at once."""
    prompt: int = 128
    """Tokens in a prompt."""
    new: int = 128
    """Tokens to add."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the checkpoint; ours widens bfloat16 to float32 once, on reading."""
    rounds: int = 3
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table for each model and batch."""
    options = tyro.cli(GenerateOptions, prog="python -m benchmarks generate", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(size, pathlib.Path(folder), options.dtype)
            for batch in options.batch:
                title = f"{size}, {options.dtype}, batch {batch}, {options.prompt} tokens and "
                title += f"{options.new} new"
                candidates = _candidates(options, pathlib.Path(folder), batch)
                results = harness.compare(candidates, "ours", rounds=options.rounds)
                harness.show(title, [_with_rate(r, batch * options.new) for r in results])
                tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _with_rate(result: harness.Timing, tokens: int) -> harness.Timing:
    rate = f"{tokens / result.seconds:.1f} tokens/s"
    return dataclasses.replace(result, note=f"{rate} {result.note}".strip())


def write_checkpoint(size: str, folder: pathlib.Path, dtype: str) -> None:
    import jax
    from flax import nnx

    import models

    config = dataclasses.replace(
        models.find_preset("125m"), **SIZES[size], weights="out_in", tied=False
    )
    graph, state = nnx.split(models.Decoder(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda a: a.astype(dtype), state)
    models.save(nnx.merge(graph, state), folder)


def _candidates(
    options: GenerateOptions, folder: pathlib.Path, batch: int
) -> Mapping[str, Callable[[], Any]]:
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, 32_000, (batch, options.prompt)).astype(np.int32)
    candidates = {"ours": _ours(options, folder, tokens)}
    for name, other in (("transformers", _transformers), ("llama.cpp", _llama_cpp)):
        try:
            candidates[name] = other(options, folder, tokens)
        except ImportError as error:
            harness.console().print(f"{name} is not timed: {error}")
    return candidates


def _ours(options, folder, tokens):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import models
    from models.checkpoints.slots import bytes_of

    model = models.load(folder, stacked=False)
    resident = bytes_of(nnx.state(model)) / 1e6
    harness.console().print(f"ours keeps {resident:,.0f} MB of parameters")
    prompts = jnp.asarray(tokens)

    def run():
        return jax.block_until_ready(models.generate(model, prompts, max_new_tokens=options.new))

    run()
    return run


def _llama_cpp(options, folder, tokens):
    import llama_cpp  # noqa: F401

    from benchmarks.llama_cpp_text import greedy, write_gguf
    from models.checkpoints.reading import read_config

    file = folder / "model.gguf"
    if not file.exists():
        write_gguf(folder, read_config(folder), file)
    return greedy(file, tokens, options.new)


def _transformers(options, folder, tokens):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options.dtype)
    ).eval()
    prompts = torch.tensor(tokens).long()

    def run():
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=options.new,
                min_new_tokens=options.new,
                do_sample=False,
                pad_token_id=0,
            )

    run()
    return run
