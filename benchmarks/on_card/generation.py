"""Text from random models on the card: tokens per second of decoding, against transformers.

Weights and caches are bfloat16. A step reads the weights and the keys and values so far, which
bounds it by the memory's bandwidth. The reading of the prompt is left out: the time of a step is
that of the later tokens alone.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.on_card.row import Row
from benchmarks.on_card.session import Session, failure
from benchmarks.on_card.weights import random_weights
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generation import stream
from models.presets import find_preset
from models.sampling import Sampling

_DTYPE = "bfloat16"
_PROMPT, _NEW = 128, 128  # tokens
_REPEATS = 3
# preset -> seconds of ours and of transformers for one batch, compiling included
_COSTS = {"smollm2-135m": (12.0, 20.0), "1b": (12.0, 15.0)}


def run(session: Session) -> None:
    """Ours first, for every model and batch; then transformers, which shares the card's memory."""
    steps: dict[tuple[str, int], float] = {}
    costs = {"nano": (30.0, 20.0)} if session.small else _COSTS
    batches = (1, 8) if session.small else (1, 8, 64)
    for preset, (cost, _) in costs.items():
        config = _config(preset)
        model = functools.cache(functools.partial(_model, config))
        for batch in batches:
            measure = functools.partial(_ours, session, model, config, preset, batch, steps)
            session.measure(_name(preset, batch), cost, measure)
    for preset, (_, cost) in costs.items():
        config = _config(preset)
        their_model = functools.cache(functools.partial(_their_model, config))
        for batch in batches:
            measure = functools.partial(_theirs, session, their_model, config, preset, batch, steps)
            session.measure(f"{_name(preset, batch)}, transformers", cost, measure)


def _name(preset: str, batch: int) -> str:
    return f"{preset}, batch {batch}, {_DTYPE}"


def _config(preset: str) -> DecoderConfig:
    # As a checkpoint is loaded for generation.
    form: dict[str, Any] = {"weights": "out_in", "stacked": False, "context": _PROMPT + _NEW}
    return dataclasses.replace(find_preset(preset), **form)


def _model(config: DecoderConfig) -> Decoder:
    graph, shapes = nnx.split(Decoder.shapes(config, dtype=_DTYPE))
    return nnx.merge(graph, random_weights(shapes, config.init_std, _DTYPE))


def _ours(
    session: Session,
    make_model: Callable[[], Decoder],
    config: DecoderConfig,
    preset: str,
    batch: int,
    steps: dict[tuple[str, int], float],
) -> Iterator[Row]:
    model, new = make_model(), _new(session)
    prompts = _prompts(config, batch)

    def once() -> float:
        """Seconds of a step, from the first new token to the last one."""
        tokens = stream(model, prompts, Sampling(), new)
        next(tokens)
        begun = time.perf_counter()
        for _ in tokens:
            pass
        return (time.perf_counter() - begun) / (new - 1)

    begun = time.perf_counter()
    first = once()
    compiling = max(0.0, time.perf_counter() - begun - first * new)
    seconds = statistics.median(once() for _ in range(_REPEATS))
    steps[preset, batch] = seconds
    row = _row(session, config, preset, batch, "wsekern", seconds)
    yield dataclasses.replace(row, compile_seconds=compiling)


def _theirs(
    session: Session,
    make_model: Callable[[], Any],
    config: DecoderConfig,
    preset: str,
    batch: int,
    steps: dict[tuple[str, int], float],
) -> Iterator[Row]:
    try:
        seconds = _their_step(make_model, _prompts(config, batch), _new(session))
    except Exception as error:  # a peer that cannot be had here says nothing about wsekern
        row = failure(_name(preset, batch), error, "transformers")
        yield dataclasses.replace(row, status="missing")
        return
    row = _row(session, config, preset, batch, "transformers", seconds)
    ours = steps.get((preset, batch))
    note = "" if ours is None else f"wsekern takes {ours / seconds:.2f} of its time"
    yield dataclasses.replace(row, note=note)


def _their_step(make_model: Callable[[], Any], tokens: np.ndarray, new: int) -> float:
    """Seconds of a step of transformers: what `new` tokens take beyond a quarter of them."""
    import torch

    model = make_model()
    prompts = torch.tensor(tokens).long().to(model.device)

    def seconds_of(count: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    short = new // 4
    seconds_of(short)
    apart = [(seconds_of(new) - seconds_of(short)) / (new - short) for _ in range(_REPEATS)]
    return max(statistics.median(apart), 1e-9)


def _their_model(config: DecoderConfig) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied,
        eos_token_id=None,
    )
    on_card = jax.default_backend() != "cpu"
    if on_card and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here; install the torch of this card")
    with torch.device("cuda" if on_card else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    return model.eval()


def _row(
    session: Session,
    config: DecoderConfig,
    preset: str,
    batch: int,
    candidate: str,
    seconds: float,
) -> Row:
    bandwidth, name = session.ceilings.bandwidth
    read = _bytes_of_a_step(config, batch, _PROMPT + _new(session) / 2)
    return Row(
        measurement=_name(preset, batch),
        candidate=candidate,
        seconds=seconds,
        rate=batch / seconds,
        unit="tokens/s",
        share=read / seconds / bandwidth if bandwidth else None,
        ceiling=name,
    )


def _bytes_of_a_step(config: DecoderConfig, batch: int, length: float) -> float:
    """Bytes of weights, and of keys and values of `length` tokens a sequence."""
    shapes = jax.tree.leaves(nnx.state(Decoder.shapes(dataclasses.replace(config, stacked=True))))
    weights = sum(leaf.size for leaf in shapes)
    return 2 * (weights + 2 * batch * config.layers * config.d_kv * length)


def _new(session: Session) -> int:
    return 16 if session.small else _NEW


def _prompts(config: DecoderConfig, batch: int) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, config.vocab, (batch, _PROMPT))
    return drawn.astype(np.int32)
