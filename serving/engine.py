"""The inference engine: many requests at once through one model, each as if it were alone.

Continuous batching: G.-I. Yu et al., "Orca: A Distributed Serving System for Transformer-Based
Generative Models", 2022. Chunked prompts: A. Agrawal et al., "Taming Throughput-Latency Tradeoff in
LLM Inference with Sarathi-Serve", 2024.
"""

import collections
import dataclasses
import hashlib
import pathlib
import secrets
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from models.config import DecoderConfig
from models.decoder import Decoder
from models.text.tokenizer import Tokenizer
from serving.draft import Draft
from serving.equality import find_shapes, scoring_shape
from serving.generation import Generation, wake
from serving.launcher import MOST_GUESSING, Launcher
from serving.pages import PagePool
from serving.programs import DeviceSizes, Programs
from serving.prompt_cache import PromptCache
from serving.request import Delta, PromptTooLong, QueueFull, SamplingParams, TokenLogprobs
from serving.scheduler import Scheduler, Stream
from serving.speculation import PromptLookup
from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

PAGE_TOKENS = 32
_CACHE_BYTES = 256 << 20  # of keys and values, unless the caller says how many tokens
_SNAPSHOT_EVERY = 0.05  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
    """A running request."""

    id: str
    state: str  # "prefill" or "decode"
    prompt_tokens: int
    tokens: int  # made so far
    most_tokens: int  # that it may make
    pages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSnapshot:
    """What an engine is doing."""

    slots: tuple[Slot, ...]  # of running requests
    waiting: int
    max_streams: int
    pages_total: int
    pages_free: int
    pages_evictable: int
    pages_held: int
    page_tokens: int
    page_kinds: str  # of each page by number: "h" held, "e" evictable, "." free
    grid: tuple[int, int]  # height and width in PEs; 1, 1 without a wafer
    totals: dict[str, int]  # counters since the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The tokens that a request made."""

    tokens: tuple[int, ...]
    text: str  # "" without a tokenizer
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]  # of the prompt's tokens but the first
    finish: str  # "stop", "length", "cancelled" or "error"
    error: str


def find_max_tokens(
    config: DecoderConfig,
    kv_dtype: jax.typing.DTypeLike,
    wafer: Wafer | None,
    *,
    max_streams: int,
    kv_tokens: int | None,
) -> int:
    """Tokens of prompt and text together in an `Engine` of a model; known before it is loaded.

    Args:
      config: of the model.
      kv_dtype: of keys and values.
      wafer: where the model will lie; None: one device.
      max_streams: as the engine gets it.
      kv_tokens: as the engine gets it.
    """
    page_tokens = _whole_pages(PAGE_TOKENS, wafer)
    pages = _count_pages(config, np.dtype(kv_dtype), max_streams, kv_tokens, page_tokens)
    return min(config.context, pages * page_tokens)


def _whole_pages(page_tokens: int, wafer: Wafer | None) -> int:
    """`page_tokens`, rounded up so that every row of the wafer has equally many."""
    return page_tokens + -page_tokens % (1 if wafer is None else wafer.height)


def _count_pages(
    config: DecoderConfig,
    dtype: np.dtype,
    max_streams: int,
    kv_tokens: int | None,
    page_tokens: int,
) -> int:
    if kv_tokens is None:
        # In int8, each token has a scale in each head.
        scale = 4 if dtype == np.int8 else 0
        token = 2 * config.layers * config.kv_heads * (config.d_head * dtype.itemsize + scale)
        kv_tokens = min(max_streams * config.context, max(1024, _CACHE_BYTES // token))
    return -(-kv_tokens // page_tokens)


class EngineClosed(RuntimeError):
    """The engine takes no requests any more."""


class Engine:
    """Serves one model: requests share its steps and its cache of keys and values.

        engine = Engine(models.load("SmolLM2-135M-Instruct"), tokenizer)
        engine.generate([tokenizer.encode("Once")], SamplingParams(max_tokens=32))
        async for delta in engine.submit(prompt, params): ...

    The text of a request that takes the likeliest tokens is the same to the last bit alone and
    among others, whatever is in the cache, and with and without guesses: `is_exact` says whether
    that was found to hold on this machine. `max_tokens` is the most that a prompt and its text may
    have together, and `config` the model's.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        wafer: Wafer | None = None,
        max_streams: int = 32,
        max_waiting: int = 1024,
        kv_tokens: int | None = None,
        kv_dtype: jax.typing.DTypeLike | None = None,
        page_tokens: int = PAGE_TOKENS,
        chunk: int = 128,
        lookup: bool = True,
        draft: Decoder | None = None,
        folder: pathlib.Path | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        """Compiles, or loads, all programs; requests can come when this returns.

        Args:
          model: a decoder; with stacked layers, its programs are small.
          tokenizer: of the model; None: completions have no text.
          wafer: where the model lies; by default the current wafer, or one device without one.
          max_streams: requests that run at once; others wait.
          max_waiting: requests that wait at most; more are refused.
          kv_tokens: tokens whose keys and values the cache holds, of all requests together; by
            default as many as 256 MB hold, up to the context of every stream.
          kv_dtype: of keys and values; by default the model's. In int8 they take about a quarter
            of the memory of float32.
          page_tokens: tokens of a page of the cache, rounded up to a multiple of the wafer's
            height. Prefixes are shared in whole pages.
          chunk: tokens of prompts that are read between two steps of decoding: a long prompt
            stalls running requests for as long as that takes.
          lookup: whether few requests guess ahead by prompt lookup.
          draft: a small model with the same tokens, which guesses where lookup finds nothing.
          folder: where compiled programs are kept; None: nowhere.
          prompt_cache: where prompts that were read are kept from `close` to the next start; None:
            nowhere.

        Raises:
          ValueError: a number is out of range, or the tokenizer is not of the model.
        """
        _check_sizes(
            max_streams=max_streams,
            max_waiting=max_waiting,
            chunk=chunk,
            page_tokens=page_tokens,
            kv_tokens=1 if kv_tokens is None else kv_tokens,
        )
        self._tokenizer = tokenizer
        self.config: DecoderConfig = model.config
        wafer = context.resolve(wafer)
        dtype = np.dtype(model.dtype if kv_dtype is None else kv_dtype)
        page_tokens = _whole_pages(page_tokens, wafer)
        sizes = _size_cache(model.config, tokenizer, max_streams, kv_tokens, page_tokens, dtype)
        self.max_tokens = min(self.config.context, sizes.pages * page_tokens)
        self.max_streams, self.max_waiting = max_streams, max_waiting
        programs = Programs(model, sizes, kv_dtype=dtype, wafer=wafer, folder=folder)
        guesses = lookup or draft is not None
        shapes, self.is_exact = find_shapes(programs, max_streams, guesses=guesses, chunk=chunk)
        self.programs = programs
        scores = scoring_shape(programs.least_rows)
        programs.prepare(scores)
        self._pool = PagePool(sizes.pages, page_tokens)
        self._prompt_cache = prompt_cache
        if prompt_cache is not None:
            prompt_cache.restore(programs, self._pool)
        self._scheduler = Scheduler(self._pool, max_streams)
        self._launcher = Launcher(
            self._scheduler,
            programs,
            shapes,
            scores,
            self._deliver,
            chunk=chunk,
            draft=None if draft is None else self._make_draft(draft, programs),
        )
        self._lookup = lookup
        self._streams: dict[Generation, Stream] = {}
        self._delivered: dict[Generation, None] = {}
        self._inbox: collections.deque[Stream] = collections.deque()
        self._cancelled: collections.deque[Generation] = collections.deque()
        self._changed = threading.Condition()
        self._closing = self._stopped = False
        self._failure: BaseException | None = None
        self._snapshot, self._snapshot_at = self._take_snapshot(), 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests."""
        return not self._closing and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine, such as XLA's without memory; None: there was none."""
        return self._failure

    def submit(self, prompt: Sequence[int] | np.ndarray, params: SamplingParams) -> Generation:
        """Lets a request join; its tokens come from iterating over what is returned.

        Args:
          prompt: at least one token.
          params: how its tokens are chosen, and when it ends.

        Raises:
          QueueFull: as many requests wait as are allowed.
          PromptTooLong: the prompt leaves no room for a token.
          ValueError: the prompt is empty, or a number is out of range.
          EngineClosed: the engine is closing, or has failed.
        """
        stream = self._make_stream(np.asarray(prompt, np.int64), params)
        with self._changed:
            if self._closing or self._failure is not None:
                raise EngineClosed("the engine takes no requests any more")
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self.max_waiting:
                raise QueueFull(f"{waiting} requests are waiting already")
            self._streams[stream.generation] = stream
            self._inbox.append(stream)
            self._changed.notify_all()
        return stream.generation

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
    ) -> list[Completion]:
        """The completions of several prompts; waits for all.

        Args:
          prompts: tokens of each.
          params: for all prompts, or one for each.

        Raises:
          ValueError: as `submit`; or there are not as many `params` as prompts.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        generations = [self.submit(p, one) for p, one in zip(prompts, each, strict=True)]
        completions = []
        for generation in generations:
            deltas = list(generation)
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            completions.append(
                Completion(
                    tokens=tokens,
                    text="" if self._tokenizer is None else self._tokenizer.decode(tokens),
                    logprobs=tuple(one for delta in deltas for one in delta.logprobs),
                    prompt_logprobs=tuple(one for d in deltas for one in d.prompt_logprobs),
                    finish=deltas[-1].finish or "error",
                    error=deltas[-1].error,
                )
            )
        return completions

    def snapshot(self) -> EngineSnapshot:
        """What the engine is doing, or was a moment ago."""
        return self._snapshot

    def close(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets those there are go on for `timeout` seconds, and ends."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._streams and self._failure is None and time.monotonic() < deadline:
                self._changed.wait(min(0.05, max(0.0, deadline - time.monotonic())))
            self._cancelled.extend(self._streams)
            self._stopped = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            if self._prompt_cache is not None and self._failure is None:
                self._prompt_cache.save(self.programs, self._pool)
                self._prompt_cache = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_stream(self, prompt: np.ndarray, params: SamplingParams) -> Stream:
        vocab = self.config.vocab
        params.check(vocab)
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError("the prompt has no tokens; say something")
        if prompt.min() < 0 or prompt.max() >= vocab:
            wrong = prompt[(prompt < 0) | (prompt >= vocab)][0]
            raise ValueError(f"the prompt's token {wrong} is none of the model's {vocab}")
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, the context is {self.max_tokens} tokens and "
                "must hold one more; shorten it"
            )
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        text = np.zeros(len(prompt) + most, np.int32)
        text[: len(prompt)] = prompt
        seed = secrets.randbits(64) if params.seed is None else params.seed
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        generation = Generation(secrets.token_hex(12), self._cancel)
        generation.usage.prompt_tokens = len(prompt)
        return Stream(
            generation=generation,
            params=params,
            prompt_tokens=len(prompt),
            text=text,
            length=len(prompt),
            seed=np.frombuffer(digest, np.uint32),
            arrival=0,
            lookup=PromptLookup(params.prediction, prompt.tolist()) if self._lookup else None,
        )

    def _make_draft(self, model: Decoder, programs: Programs) -> Draft:
        if model.config.vocab < programs.sizes.vocab:
            raise ValueError(
                f"Engine: draft has {model.config.vocab} tokens, the model has "
                f"{programs.sizes.vocab}; take a draft with the same tokenizer"
            )
        small = Programs(
            model,
            programs.sizes._replace(vocab=min(programs.sizes.vocab, model.config.vocab)),
            kv_dtype=model.dtype,
            wafer=programs.wafer,
            folder=programs.folder,
        )
        return Draft(small, most=MOST_GUESSING, context=model.config.context)

    def _cancel(self, generation: Generation) -> None:
        with self._changed:
            self._cancelled.append(generation)
            self._changed.notify_all()

    def _deliver(self, stream: Stream, delta: Delta) -> None:
        stream.generation.put(delta)
        self._delivered[stream.generation] = None
        if delta.finish is not None:
            self._streams.pop(stream.generation, None)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._launcher.advance()
                wake(self._delivered)
                self._delivered.clear()
                now = time.monotonic()
                if self._launcher.is_idle or now - self._snapshot_at > _SNAPSHOT_EVERY:
                    self._snapshot, self._snapshot_at = self._take_snapshot(), now
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._snapshot = self._take_snapshot()

    def _wait_for_work(self) -> bool:
        """Takes in what has come; False when the engine is to end."""
        with self._changed:
            while self._launcher.is_idle and not (self._inbox or self._cancelled):
                self._scheduler.check()
                self._changed.notify_all()
                if self._stopped:
                    return False
                self._changed.wait()
            arrived = [self._inbox.popleft() for _ in range(len(self._inbox))]
            cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
            for stream in arrived:
                self._scheduler.add(stream)
            streams = [self._streams[one] for one in cancelled if one in self._streams]
        for stream in streams:
            self._launcher.finish(stream, "cancelled")
        return True

    def _fail(self, error: BaseException) -> None:
        """Tells every request that the engine is gone."""
        with self._changed:
            self._failure = error
            streams = list(self._streams.values())
            self._streams.clear()
            self._changed.notify_all()
        for stream in streams:
            stream.generation.put(Delta(finish="error", error="the engine has failed"))
        wake([stream.generation for stream in streams])

    def _take_snapshot(self) -> EngineSnapshot:
        wafer = self.programs.wafer
        return EngineSnapshot(
            slots=tuple(
                Slot(
                    id=stream.generation.id,
                    state="prefill" if stream.reads else "decode",
                    prompt_tokens=stream.prompt_tokens,
                    tokens=stream.made,
                    most_tokens=len(stream.text) - stream.prompt_tokens,
                    pages=len(stream.pages),
                )
                for stream in self._scheduler.running
            ),
            waiting=len(self._scheduler.waiting),
            max_streams=self.max_streams,
            pages_total=self._pool.pages,
            pages_free=self._pool.free,
            pages_evictable=self._pool.evictable,
            pages_held=self._pool.held,
            page_tokens=self._pool.page_tokens,
            page_kinds=self._pool.kinds,
            grid=(1, 1) if wafer is None else (wafer.height, wafer.width),
            totals=dict(self._launcher.totals) | {"retractions": self._scheduler.retractions},
        )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"Engine: {name}={value} must be 1 or more")


def _size_cache(
    config: DecoderConfig,
    tokenizer: Tokenizer | None,
    max_streams: int,
    kv_tokens: int | None,
    page_tokens: int,
    dtype: np.dtype,
) -> DeviceSizes:
    """What lies on the device."""
    vocab = config.vocab
    if tokenizer is not None:
        tokenizer.check(vocab)
        vocab = min(vocab, tokenizer.vocab)
    pages = _count_pages(config, dtype, max_streams, kv_tokens, page_tokens)
    return DeviceSizes(
        pages=pages,
        page_tokens=page_tokens,
        slots=max_streams,
        columns=-(-min(config.context, pages * page_tokens) // page_tokens),
        vocab=vocab,
    )
