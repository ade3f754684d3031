"""Which requests run, and with which pages: admission, retraction, the order of prompts.

No device and no thread is known here: the engine asks what to do next, and tells what came of it.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from serving.pages import PagePool
from serving.request import SamplingParams, TokenLogprobs
from serving.speculation import PromptLookup

_HEAD_START = 32  # tokens that a waiting prompt seems shorter each time another is taken first


@dataclasses.dataclass(eq=False)
class Stream:
    """One request: its text so far, its pages, and how much of it is on the device.

    tokens    P P P P P P G G G            prompt, then generated
    computed  . . . . . . . .              keys and values are written, or will be by a step
                                           that is launched
    in flight                 ?            tokens that such a step will bring
    """

    generation: Any  # the caller's side
    params: SamplingParams
    prompt_tokens: int
    text: np.ndarray  # int32, with room for all that the request may make
    length: int  # of the text that is known
    seed: np.ndarray  # uint32 [2]
    arrival: int
    slot: int | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    kept: int = 0  # full pages that are known by their hash
    passed_over: int = 0
    is_counted: bool = False  # whether totals have its prompt, which may be read again
    is_finished: bool = False
    lookup: PromptLookup | None = None
    drafted: int = 0  # tokens that a draft model has read
    # Of the prompt's tokens but the first, how likely each was; of requests that ask.
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> np.ndarray:
        """The text that is known, int32."""
        return self.text[: self.length]

    @property
    def made(self) -> int:
        """How many tokens the request has made that are known."""
        return self.length - self.prompt_tokens

    @property
    def room(self) -> int:
        """How many more tokens it may make, beyond those in flight."""
        return len(self.text) - self.length - self.in_flight

    @property
    def unscored(self) -> int:
        """Tokens of the prompt whose likelihood is asked for and not known."""
        is_asked = self.params.prompt_logprobs is not None
        return self.prompt_tokens - 1 - len(self.scores) if is_asked else 0

    @property
    def reads(self) -> bool:
        """Whether tokens of its text are not computed yet, but for the newest."""
        return self.computed + 1 < self.length or (self.computed == 0 and not self.in_flight)


class Scheduler:
    """The requests of an engine, waiting and running."""

    def __init__(self, pool: PagePool, max_streams: int) -> None:
        self.pool = pool
        self.waiting: list[Stream] = []
        self.running: list[Stream] = []  # in the order of admission
        self._slots = list(range(max_streams))
        self._arrivals = itertools.count()
        self.retractions = 0

    def add(self, stream: Stream) -> None:
        """Lets a request wait."""
        stream.arrival = next(self._arrivals)
        self.waiting.append(stream)

    def admit(self) -> Iterator[Stream]:
        """Gives slots to waiting requests, as far as there are slots and pages."""
        while self.waiting and self._slots:
            stream = self._next(self.waiting)
            # One page more for each that runs: it should not be retracted at once.
            needed = self._pages_for(stream.length + 1) + len(self.running)
            if self.running and needed > self.pool.free + self.pool.evictable:
                return
            self.waiting.remove(stream)
            stream.slot = heapq.heappop(self._slots)
            self.running.append(stream)
            yield stream

    def next_to_read(self) -> Stream | None:
        """The running request whose prompt is read next: the shortest, unless others wait long."""
        reading = [stream for stream in self.running if stream.reads]
        return self._next(reading) if reading else None

    def find_prefix(self, stream: Stream) -> int:
        """Takes over pages that hold the beginning of the text; returns its tokens in them."""
        pool = self.pool
        stream.hashes = pool.hashes(stream.tokens)
        # The last token is computed in any case: its logits are needed.
        usable = 0 if stream.unscored else (stream.length - 1) // pool.page_tokens
        stream.pages = pool.match(stream.hashes[:usable])
        stream.kept = len(stream.pages)
        stream.computed = stream.kept * pool.page_tokens
        return stream.computed

    def provide(self, stream: Stream, tokens: int) -> bool:
        """Gives a stream pages for its first `tokens` tokens; False if there are too few."""
        missing = self._pages_for(tokens) - len(stream.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(missing)
        if pages is None:
            return False
        stream.pages += pages
        return True

    def keep_pages(self, stream: Stream) -> None:
        """Makes the pages known that are full of tokens of a known text."""
        full = min(stream.computed, stream.length) // self.pool.page_tokens
        if full > stream.kept:
            stream.hashes = self.pool.hashes(stream.tokens, stream.hashes)
            for page in range(stream.kept, full):
                self.pool.keep(stream.pages[page], stream.hashes[page])
            stream.kept = full

    def youngest(self) -> Stream:
        """The running request that came last."""
        return max(self.running, key=lambda stream: stream.arrival)

    def retract(self, stream: Stream) -> None:
        """Takes slot and pages from a running request, which waits again and loses no token."""
        self._free(stream)
        self.waiting.insert(0, stream)
        self.retractions += 1

    def remove(self, stream: Stream) -> None:
        """Ends a request, waiting or running."""
        stream.is_finished = True
        if stream.slot is None:
            if stream in self.waiting:
                self.waiting.remove(stream)
            return
        self._free(stream)

    def check(self) -> None:
        """Raises AssertionError unless free, evictable and held pages are all pages."""
        self.pool.check([stream.pages for stream in self.running])

    def _free(self, stream: Stream) -> None:
        self.pool.release(stream.pages)
        assert stream.slot is not None
        heapq.heappush(self._slots, stream.slot)
        self.running.remove(stream)
        stream.slot, stream.pages, stream.hashes = None, [], []
        stream.computed = stream.kept = stream.in_flight = stream.drafted = 0

    def _next(self, streams: list[Stream]) -> Stream:
        def key(stream: Stream) -> tuple[int, int]:
            rest = stream.length - stream.computed
            return rest - _HEAD_START * stream.passed_over, stream.arrival

        chosen = min(streams, key=key)
        for stream in streams:
            # The chosen one keeps its head start: of equal prompts, the first is read to its end.
            stream.passed_over += stream is not chosen
        return chosen

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_tokens)
