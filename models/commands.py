"""The commands of `python -m models`: generate, info and convert."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from models.arguments import ConvertCommand, GenerateCommand, InfoCommand
from models.checkpoints.hub import find
from models.checkpoints.reading import load, open_checkpoint, read, read_config, stored_dtype
from models.checkpoints.saving import save
from models.checkpoints.slots import bytes_of
from models.decoder import Decoder
from models.generation import Step, stream
from models.presets import PRESETS
from models.sampling import Sampling
from models.text.reading import copy_tokenizer, load_tokenizer
from models.text.tokenizer import Tokenizer
from wsekern.error_line import printable, without_controls
from wsekern.estimator.pictures.output import check_new_folder
from wsekern.progress import show_progress
from wsekern.wafer.launch import find_devices, keep_compiled_programs, make_wafer
from wsekern.wafer.wafer import Wafer

_NEW_TOKENS = 128  # unless the command says how many


def generate(command: GenerateCommand) -> int:
    """Streams text to standard output; figures go to standard error."""
    path = find(command.model)
    tokenizer = load_tokenizer(path)
    wafer = _wafer(command)
    keep_compiled_programs()
    with wafer or contextlib.nullcontext():
        start = time.perf_counter()
        model = load(path, command.dtype, wafer, stacked=False, progress=sys.stderr.isatty())
        tokenizer.check(model.config.vocab)
        note = (
            f"{_count(nnx.state(model)):,} parameters, {bytes_of(nnx.state(model)) / 1e6:,.0f} MB"
        )
        _say(f"{path}: {note}, read in {time.perf_counter() - start:.1f} s")
        prompts = [_prompt(tokenizer, command, text) for text in command.prompt]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        sampling = Sampling(
            temperature=command.temperature, top_k=command.top_k, top_p=command.top_p
        )
        sampling.check("generate", model.config.vocab)
        tokens = np.zeros((len(prompts), max(int(lengths.max()), 1)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        room = model.config.context - int(lengths.max())
        steps = stream(
            model,
            tokens,
            sampling,
            command.max_new_tokens or max(1, min(_NEW_TOKENS, room)),
            key=jax.random.key(command.seed),
            lengths=lengths,
            stop=tokenizer.ends,
        )
        _write(command, tokenizer, steps, len(prompts))
    return 0


def info(command: InfoCommand) -> int:
    """Prints a table of the sizes and choices of a model."""
    if command.model in PRESETS:
        config, source = PRESETS[command.model], "preset"
    else:
        path = find(command.model)
        config, source = read_config(path), str(path)
    shapes = nnx.state(Decoder.shapes(config))
    table = Table(show_header=False, box=None)
    rows = {"model": command.model, "from": source, "parameters": f"{_count(shapes):,}"}
    rows |= {
        "bytes": f"{_count(shapes) * 4 / 1e9:,.2f} GB in float32, {_count(shapes) * 2 / 1e9:,.2f} "
        "in bfloat16"
    }
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "source" and value != field.default:
            rows[field.name] = str(value)
    for name, value in rows.items():
        table.add_row(name, printable(value))
    Console().print(table)
    return 0


def convert(command: ConvertCommand) -> int:
    """Writes a folder of safetensors and the tokenizer's files."""
    check_new_folder(command.out)
    path = find(command.model)
    config, tensors = open_checkpoint(path)
    dtype = command.dtype or stored_dtype(config, tensors)
    model = read(config, tensors, dtype, None, progress=sys.stderr.isatty())
    save(model, command.out)
    copy_tokenizer(path, command.out)
    _say(f"{command.out}: {_count(nnx.state(model)):,} parameters in {np.dtype(dtype).name}")
    return 0


def _wafer(command: GenerateCommand) -> Wafer | None:
    if command.wafer is None:
        find_devices(command.platform)  # refuses a platform that is not there
        return None
    return make_wafer(command.wafer, command.platform)


def _prompt(tokenizer: Tokenizer, command: GenerateCommand, text: str) -> list[int]:
    if not command.chat:
        tokens = tokenizer.encode(text)
    else:
        messages = [{"role": "user", "content": text}]
        if command.system is not None:
            messages = [{"role": "system", "content": command.system}, *messages]
        tokens = tokenizer.chat(messages, **command.template_options)
    if not tokens:
        raise ValueError(f"prompt={text!r} has no tokens; say something")
    return tokens


def _write(
    command: GenerateCommand, tokenizer: Tokenizer, steps: Iterator[Step], count: int
) -> None:
    """Writes the first text as it is made, and the others when all have ended."""
    texts: list[list[int]] = [[] for _ in range(count)]
    start, first = time.perf_counter(), None

    def tokens() -> Iterator[int]:
        nonlocal first
        for step in steps:
            first = first or time.perf_counter()
            for row, (token, end) in enumerate(zip(step.tokens, step.ended, strict=True)):
                if not end:
                    texts[row].append(int(token))
            if command.logprobs:
                named = [tokenizer.decode([t], special=True) for t in step.tokens]
                _say("\t".join(f"{n!r} {p:.4f}" for n, p in zip(named, step.logprobs, strict=True)))
            if not step.ended[0]:
                yield int(step.tokens[0])

    # A file or a program gets what the model says, a terminal nothing that it would obey.
    shown = without_controls if sys.stdout.isatty() else str
    pieces = tokenizer.stream(tokens())
    with show_progress("compiling"):
        piece: str | None = next(pieces, None)
    while piece is not None:
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
        piece = next(pieces, None)
    sys.stdout.write("\n")
    for text in texts[1:]:
        sys.stdout.write(f"\n{shown(tokenizer.decode(text))}\n")
    sys.stdout.flush()
    made, now = sum(map(len, texts)), time.perf_counter()
    if first is not None and now > first:
        steps_done = max(map(len, texts)) - 1
        rate = (made - count) / (now - first) if steps_done > 0 else 0.0
        _say(f"first token after {first - start:.2f} s, then {rate:.1f} tokens/s; {made} in all")


def _count(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _say(text: str) -> None:
    print(text, file=sys.stderr)
