"""A request from its caller's side: the tokens as they come, in a thread or in an event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from serving.request import Delta, Usage


class Generation:
    """The tokens that an engine makes for one request; iterate over it, in a thread or a task.

    What the caller has not taken yet is kept as one `Delta`: a slow reader costs the memory of its
    tokens and no more.
    """

    def __init__(self, id: str, cancel: Callable[["Generation"], None]) -> None:
        self.id = id
        self.usage = Usage()
        self._cancel = cancel
        self._deltas: list[Delta] = []
        self._ready = threading.Condition()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Ends the request; its slot is free within two steps. Does nothing after its end."""
        self._cancel(self)

    def put(self, delta: Delta) -> None:
        """Hands a delta to a caller's thread; `wake` wakes the callers in event loops."""
        with self._ready:
            self._deltas.append(delta)
            self._ready.notify_all()

    def __iter__(self) -> Iterator[Delta]:
        finish = None
        while finish is None:
            with self._ready:
                while not self._deltas:
                    self._ready.wait()
                delta = self._take()
            finish = delta.finish
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        event = asyncio.Event()
        with self._ready:
            self._listener = (asyncio.get_running_loop(), event)
        finish = None
        while finish is None:
            event.clear()
            with self._ready:
                delta = self._take() if self._deltas else None
            if delta is None:
                await event.wait()
                continue
            finish = delta.finish
            yield delta

    def _take(self) -> Delta:
        deltas, self._deltas = self._deltas, []
        if len(deltas) == 1:
            return deltas[0]
        return Delta(
            tokens=tuple(token for delta in deltas for token in delta.tokens),
            logprobs=tuple(one for delta in deltas for one in delta.logprobs),
            prompt_logprobs=tuple(one for delta in deltas for one in delta.prompt_logprobs),
            finish=deltas[-1].finish,
            error=deltas[-1].error,
        )


def wake(generations: Iterable[Generation]) -> None:
    """Wakes the event loops that wait for these generations, each loop once."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for generation in generations:
        if generation._listener is not None:
            loop, event = generation._listener
            events.setdefault(loop, []).append(event)
    for loop, waiting in events.items():
        try:
            loop.call_soon_threadsafe(_set_all, waiting)
        except RuntimeError:  # the loop is closed: nobody waits in it
            continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
