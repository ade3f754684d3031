"""The inference engine: many requests at once, first tokens, guesses, and what HTTP costs.

A random Llama answers random prompts greedily. `solo` is `models.generate` with one prompt and no
padding, what a script would do; `llama.cpp` is its library in the same process, without a server.
Everything runs in turn in one process, and ratios are medians over the rounds. Commands:
`python -m benchmarks serve`, and `python -m benchmarks serve --parts stored memory --gguf FILE`.
"""

import asyncio
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tyro
from rich import box
from rich.table import Table

from benchmarks import harness
from benchmarks.generate import SIZES, write_checkpoint

Part = Literal["together", "first", "overhead", "guesses", "weights", "stored", "memory"]
_OF_FILES = frozenset({"stored", "memory"})  # parts that serve the file `gguf`


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Time the inference engine on one device. llama.cpp is timed if cyllama and gguf are there."""

    parts: tuple[Part, ...] = ("together", "first", "overhead", "guesses", "weights")
    """What is measured; `stored` and `memory` need `gguf`."""
    gguf: pathlib.Path | None = None
    """A model's GGUF file, which is served in its own blocks and in int4."""
    size: str = "42m"
    """Size of the model: 42m, 125m."""
    streams: tuple[int, ...] = (1, 8, 32)
    """Requests at once."""
    prompt: int = 128
    """Tokens in a prompt."""
    new: int = 128
    """Tokens to make."""
    rounds: int = 3
    """How often everything is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r} is none of {', '.join(SIZES)}")
        if self.gguf is None and (wanting := _OF_FILES.intersection(self.parts)):
            raise ValueError(f"parts={min(wanting)} needs gguf, the file that is served")


def main(argv: list[str] | None = None) -> None:
    """Prints a table for each part."""
    options = tyro.cli(ServeOptions, prog="python -m benchmarks serve", args=argv)
    harness.start(1)
    harness.show_environment()
    parts = {
        "together": time_together,
        "first": time_first_tokens,
        "overhead": time_overhead,
        "guesses": time_guesses,
        "weights": time_weights,
        "stored": time_stored,
        "memory": measure_memory,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options.size, pathlib.Path(folder), "float32")
        tables = {}
        for part in options.parts:
            file = options.gguf if part in _OF_FILES else None
            title, rows = parts[part](ServeBench(options, file or pathlib.Path(folder)))
            tables[title] = rows
            _show(title, rows)
    if options.json:
        harness.dump(options.json, {}, {"serving": tables})


Rows = list[dict[str, str]]


class ServeBench:
    """A model on disk, its prompts, and what is made of it."""

    def __init__(self, options: ServeOptions, path: pathlib.Path) -> None:
        from models.checkpoints.reading import read_config

        self.options, self.path = options, path
        self.vocab = read_config(path).vocab
        self._rng = np.random.default_rng(0)

    def prompts(self, count: int, tokens: int | None = None) -> list[list[int]]:
        """Prompts that no cache has met."""
        shape = (count, tokens or self.options.prompt)
        return self._rng.integers(0, self.vocab, shape).tolist()

    def engine(self, **options: Any) -> Any:
        """An engine of the model; `weights` and `activations` go to the loader."""
        from serving.arguments import ModelOptions
        from serving.engine import Engine
        from serving.loading import load_model

        kinds = {k: options.pop(k) for k in ("weights", "activations") if k in options}
        model = load_model(self.path, ModelOptions(**kinds), None)
        return Engine(model, max_streams=max(self.options.streams), **options)

    def params(self, new: int | None = None) -> Any:
        from serving.request import SamplingParams

        return SamplingParams(max_tokens=new or self.options.new)


def time_together(bench: ServeBench) -> tuple[str, Rows]:
    """Tokens per second of several requests at once, against a loop of one without padding."""
    options, rows = bench.options, []
    solo = _solo(bench)
    with bench.engine(lookup=False) as engine:
        for streams in options.streams:
            peer = _llama_cpp(bench, streams)
            times: dict[str, list[float]] = {"solo": [], "engine": [], "llama.cpp": []}
            equal = True
            for _ in range(options.rounds):
                prompts = bench.prompts(streams)
                times["solo"].append(_seconds(solo, prompts[0]) * streams)
                begun = time.perf_counter()
                made = engine.generate(prompts, bench.params())
                times["engine"].append(time.perf_counter() - begun)
                alone = engine.generate(prompts[:1], bench.params())[0].tokens
                equal &= alone == made[0].tokens
                if peer is not None:
                    times["llama.cpp"].append(_seconds(peer, prompts))
            tokens = streams * options.new
            row = {"streams": str(streams)}
            for name, seconds in times.items():
                if seconds:
                    row[f"{name}, tokens/s"] = f"{tokens / statistics.median(seconds):,.0f}"
            row["engine over solo"] = _ratio(times["solo"], times["engine"])
            if peer is not None:
                row["engine over llama.cpp"] = _ratio(times["llama.cpp"], times["engine"])
            row["same text alone"] = "yes" if equal else "no"
            rows.append(row)
    return f"{options.size}, float32, {options.prompt} tokens in, {options.new} out", rows


def time_first_tokens(bench: ServeBench) -> tuple[str, Rows]:
    """Seconds from a request to its first token: idle, among others, in a burst, past long ones."""
    options = bench.options
    most = max(options.streams)
    rows: Rows = []
    with bench.engine(lookup=False) as engine:

        def first(prompts: Sequence[Sequence[int]], new: int = 1) -> list[float]:
            generations = [engine.submit(prompt, bench.params(new)) for prompt in prompts]
            for generation in generations:
                for _ in generation:
                    pass
            return [g.usage.first_token - g.usage.submitted for g in generations]

        idle = [first(bench.prompts(1))[0] for _ in range(5 * options.rounds)]
        others = [engine.submit(p, bench.params(800)) for p in bench.prompts(most - 1)]
        while any(slot.state == "prefill" for slot in engine.snapshot().slots) or len(
            engine.snapshot().slots
        ) < len(others):
            time.sleep(0.05)
        busy = [first(bench.prompts(1))[0] for _ in range(5 * options.rounds)]
        for one in others:
            one.cancel()
        burst = sorted(first(bench.prompts(most), 16))
        long = [engine.submit(p, bench.params(1)) for p in bench.prompts(4, 900)]
        short = first(bench.prompts(4, 16))
        for generation in long:
            for _ in generation:
                pass
        behind = [g.usage.first_token - g.usage.submitted for g in long]
    ratio = statistics.median(busy) / statistics.median(idle)
    rows.append({"request": "alone", "median": _ms(idle), "worst": _ms([max(idle)])})
    rows.append(
        {
            "request": f"while {most - 1} decode",
            "median": _ms(busy),
            "worst": _ms([max(busy)]),
            "note": f"{ratio:.1f} times that of one alone",
        }
    )
    marks = ", ".join(_ms([burst[i]]) for i in range(most // 8 - 1, most, max(1, most // 8)))
    rows.append(
        {
            "request": f"burst of {most}",
            "median": _ms(burst),
            "worst": _ms([burst[-1]]),
            "note": f"every {max(1, most // 8)}th: {marks}",
        }
    )
    rows.append(
        {
            "request": "16 tokens, behind four prompts of 900",
            "median": _ms(short),
            "worst": _ms([max(short)]),
            "note": f"the long ones: {_ms(behind)}",
        }
    )
    return f"{options.size}: time to the first token, prompts of {options.prompt} tokens", rows


def time_overhead(bench: ServeBench) -> tuple[str, Rows]:
    """What scheduling, text and HTTP add to the bare loop of padded steps, for one stream."""
    from models.text.tokenizer import bytes_tokenizer

    options = bench.options
    with bench.engine(lookup=False, tokenizer=bytes_tokenizer()) as engine:
        bare = _bare_loop(bench, engine)
        with _server(bench, engine) as ask:
            times: dict[str, list[float]] = {
                "bare padded steps": [],
                "engine": [],
                "HTTP, streamed": [],
            }
            for _ in range(options.rounds):
                # Each another prompt: none finds another's in the cache.
                a, b, c = (bytes(t % 95 + 32 for t in p) for p in bench.prompts(3))
                times["bare padded steps"].append(_seconds(bare, list(a)))
                times["engine"].append(_seconds(engine.generate, [list(b)], bench.params()))
                times["HTTP, streamed"].append(_seconds(ask, c.decode()))
    rows = [
        {
            "way": name,
            "tokens/s": f"{options.new / statistics.median(seconds):,.0f}",
            "over the bare steps": _ratio(seconds, times["bare padded steps"]),
        }
        for name, seconds in times.items()
    ]
    return f"{options.size}: one stream, {options.prompt} tokens in, {options.new} out", rows


def time_guesses(bench: ServeBench) -> tuple[str, Rows]:
    """One stream whose text repeats its prompt, with and without prompt lookup."""
    options = bench.options
    times: dict[str, list[float]] = {"without guesses": [], "prompt lookup": []}
    with bench.engine(lookup=False) as plain, bench.engine() as guessing:
        for _ in range(options.rounds):
            # A greedy random model falls into a loop: its own text is what repeats.
            (prompt,) = bench.prompts(1)
            (start,) = plain.generate([prompt], bench.params())
            repeating = prompt + list(start.tokens)
            engines = zip(times, (plain, guessing), strict=True)
            texts = []
            for name, engine in engines:
                engine.generate([repeating], bench.params(1))  # the prompt is read before
                begun = time.perf_counter()
                texts.append(engine.generate([repeating], bench.params())[0].tokens)
                times[name].append(time.perf_counter() - begun)
            if texts[0] != texts[1]:
                raise RuntimeError("guessing changed a text")
        totals = guessing.snapshot().totals
    share = totals["accepted_tokens"] / max(1, totals["guessed_tokens"])
    rows = [
        {
            "engine": name,
            "tokens/s": f"{options.new / statistics.median(seconds):,.0f}",
            "times as fast": _ratio(times["without guesses"], seconds),
        }
        for name, seconds in times.items()
    ]
    rows[-1]["guesses that were right"] = f"{share:.0%}"
    return f"{options.size}: one stream, a text that repeats", rows


def time_weights(bench: ServeBench) -> tuple[str, Rows]:
    """One stream with weights in fewer bits."""
    kinds: Mapping[str, dict[str, Any]] = {
        "float32": {},
        "int8": {"weights": "int8"},
        "int8, activations int8": {"weights": "int8", "activations": "int8"},
        "int4": {"weights": "int4"},
    }
    options = bench.options
    engines = {name: bench.engine(lookup=False, **kind) for name, kind in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        prompts = bench.prompts(1)
        for name, engine in engines.items():
            times[name].append(_seconds(engine.generate, prompts, bench.params()))
    for engine in engines.values():
        engine.close()
    rows = [
        {
            "weights": name,
            "tokens/s": f"{options.new / statistics.median(seconds):,.0f}",
            "times as fast": _ratio(times["float32"], seconds),
        }
        for name, seconds in times.items()
    ]
    return f"{options.size}: one stream by weights", rows


def time_stored(bench: ServeBench) -> tuple[str, Rows]:
    """A GGUF file as it is stored and in int4, beside llama.cpp on the same file."""
    options, rows, kinds = bench.options, [], ("stored", "int4")
    tokens = max(options.streams) * (options.prompt + options.new + 32)  # whole pages of each
    engines = {k: bench.engine(lookup=False, weights=k, kv_tokens=tokens) for k in kinds}
    for streams in options.streams:
        runs: dict[str, Callable[[Any], Any]] = {
            k: functools.partial(e.generate, params=bench.params()) for k, e in engines.items()
        }
        peer = _llama_cpp(bench, streams)
        if peer is not None:
            runs["llama.cpp"] = peer
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            prompts = bench.prompts(streams)
            for name, run in runs.items():
                times[name].append(_seconds(run, prompts))
        made = streams * options.new
        row = {"streams": str(streams)}
        row |= {f"{k}, tokens/s": f"{made / statistics.median(t):,.0f}" for k, t in times.items()}
        if peer is not None:
            row |= {f"{k} over llama.cpp": _ratio(times["llama.cpp"], times[k]) for k in kinds}
        rows.append(row)
    for engine in engines.values():
        engine.close()
    return f"{bench.path.name}, {options.prompt} tokens in, {options.new} out", rows


def measure_memory(bench: ServeBench) -> tuple[str, Rows]:
    """Resident memory of servers of a GGUF file, and of llama.cpp with it."""
    from benchmarks import resident

    streams = min(8, max(bench.options.streams))
    rows: Rows = []
    for weights in ("stored", "int4"):
        first, second = resident.measure_server(bench.path, weights, streams)
        row = {"way": f"serving, --weights {weights}", "resident": _mb(second)}
        rows.append(row | {"at its first start, which compiles": _mb(first)})
    if _llama_cpp_is_there():
        memory = resident.measure_llama_cpp(bench.path, streams)
        rows.append({"way": "llama.cpp in a Python", "resident": _mb(memory)})
    return f"{bench.path.name}: {streams} streams, {resident.TOKENS} tokens of cache", rows


def _solo(bench: ServeBench) -> Callable[[Sequence[int]], Any]:
    import jax.numpy as jnp

    import models

    model = models.load(bench.path, stacked=False)

    def run(prompt: Sequence[int]) -> Any:
        new = bench.options.new
        return np.asarray(models.generate(model, jnp.asarray([prompt]), max_new_tokens=new))

    run(bench.prompts(1)[0])
    return run


def _llama_cpp(bench: ServeBench, streams: int) -> Callable[[Any], Any] | None:
    if not _llama_cpp_is_there():
        return None
    from benchmarks.llama_cpp_text import greedy_together, write_gguf
    from models.checkpoints.reading import read_config

    file = bench.path if bench.path.is_file() else bench.path / "model.gguf"
    if not file.exists():
        write_gguf(bench.path, read_config(bench.path), file)
    return greedy_together(file, streams, bench.options.prompt, bench.options.new)


def _llama_cpp_is_there() -> bool:
    try:
        import cyllama  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        harness.console().print(f"llama.cpp is not measured: {error}")
        return False
    return True


def _bare_loop(bench: ServeBench, engine: Any) -> Callable[[Sequence[int]], Any]:
    """The steps of one stream and nothing else: no scheduler, no text, no thread."""
    from serving.batches import empty_batch
    from serving.programs import Shape, empty_rows

    programs = engine.programs
    read, step = Shape(1, 32), Shape(1, programs.least_rows)

    def run(prompt: Sequence[int]) -> Any:
        new = bench.options.new
        for begin in range(0, len(prompt), read.T):
            part = prompt[begin : begin + read.T]
            chosen = launch(read, part, begin, begin + len(part) == len(prompt))
        tokens = [chosen.tokens]
        for position in range(len(prompt), len(prompt) + new - 1):
            tokens.append(launch(step, [-1], position, True).tokens)
        return np.concatenate([np.asarray(one) for one in tokens])

    def launch(shape: Shape, tokens: Sequence[int], begin: int, chooses: bool) -> Any:
        batch = empty_batch(shape, programs.sizes)
        batch.tokens[0, : len(tokens)] = tokens
        batch.positions[0, : len(tokens)] = begin + np.arange(len(tokens))
        batch.tables[0] = np.arange(programs.sizes.columns)
        batch.slots[0], batch.chooses[...] = 0, chooses
        return programs.run(shape, batch, empty_rows(1, programs.vocab))

    return run


def _server(bench: ServeBench, engine: Any) -> Any:
    """A server of the engine; what it gives is a function that asks for one text."""
    import contextlib

    from models.text.tokenizer import bytes_tokenizer
    from serving.api.app import build_app
    from serving.api.registry import LoadedModels, ModelCard, Served
    from serving.api.server import HttpServer
    from serving.api.settings import Settings
    from serving.commands.http_client import HttpClient
    from serving.text.model_text import ModelText

    @contextlib.contextmanager
    def running() -> Any:
        text = ModelText(bytes_tokenizer(), vocab=bench.vocab)
        card = ModelCard(name="random", context=engine.max_tokens)
        served = Served(card=card, engine=engine, text=text, fingerprint="fp")
        server = HttpServer(build_app(LoadedModels([served]), Settings()), port=0)
        server.start()
        try:
            yield lambda prompt: asyncio.run(ask(server.url, prompt))
        finally:
            server.stop()

    async def ask(url: str, prompt: str) -> int:
        body = {"model": "random", "prompt": prompt, "max_tokens": bench.options.new}
        body |= {"temperature": 0, "stream": True, "min_tokens": bench.options.new}
        async with HttpClient(url).post("/v1/completions", body) as response:
            return len([event async for event in response.events()])

    return running()


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun


def _ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """The median of the rounds' ratios, with the lowest and the highest."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms"


def _show(title: str, rows: Rows) -> None:
    out = harness.console()
    table = Table(box=box.HEAVY_HEAD if out.is_terminal else box.MARKDOWN)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name in ("note", "way", "request") else "right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    out.print(f"\n{title}\n", highlight=False)
    out.print(table)
