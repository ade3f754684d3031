"""Several models behind one server: each loads when it is asked for, and leaves when it is idle.

One thread loads and unloads, one model after another. Requests only say that they want a model, and
wait; so a model is never loaded twice at once, and who leaves while waiting stops nothing.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import gc
import logging
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

from serving.api.logs import log, log_exception
from serving.api.registry import ModelCard, ModelUnavailable, Served, State
from wsekern.error_line import error_line

_EXPECTED = (ValueError, OSError, ImportError)  # of a model that is not as it should be


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be loaded.

    Args:
      card: what is known of it without reading its tokenizer.
      at_start: whether it is loaded at the start, rather than when it is asked for.
      describe: its whole card; reads no weights.
      load: the model, in memory.
    """

    card: ModelCard
    at_start: bool
    describe: Callable[[], ModelCard]
    load: Callable[[], Served]


class _Stay:
    """One stay of a model in memory, from the first request for it to its end.

    `users` counts the requests that have the model or wait for it. A stay that is leaving gets no
    more: they wait for the next one.
    """

    def __init__(self, model: "_Model") -> None:
        self.model = model
        self.state: Literal["asked", "loading", "loaded"] = "asked"
        self.served: Future[Served] = Future()
        self.users = 0
        self.asked = self.used = time.monotonic()  # the latter: when a request last came or went
        self.is_leaving = False


@dataclasses.dataclass(eq=False)
class _Model:
    source: ModelSource
    card: ModelCard
    stay: _Stay | None = None
    next: _Stay | None = None  # after one that is leaving


class ModelsByName:
    """Models that are loaded and unloaded as requests come; implements `registry.Models`."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        *,
        max_loaded: int | None = None,
        idle_seconds: float | None = None,
        patience: float = 10.0,
    ) -> None:
        """Loads nothing yet; `load` does.

        Args:
          sources: each of a name of its own.
          max_loaded: models in memory at once; None: all. For another one, that which was used
            least recently leaves as soon as no request has it.
          idle_seconds: without a request, after which a model is unloaded; None: never.
          patience: seconds that a request waits for room; then the model that was used least
            recently gets no more requests until it has left.

        Raises:
          ValueError: two models have one name.
        """
        self._models: dict[str, _Model] = {}
        for source in sources:
            name = source.card.name
            if name in self._models:
                raise ValueError(f"two models are called {name!r}; give one another name")
            self._models[name] = _Model(source, source.card)
        self._most = len(sources) if max_loaded is None else max_loaded
        self._idle_seconds = math.inf if idle_seconds is None else idle_seconds
        self._patience = patience
        self._changed = threading.Condition()  # guards every stay
        self._is_ending = self._is_closed = False
        self.state: State = "loading"
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._thread.start()

    @property
    def cards(self) -> Sequence[ModelCard]:
        """Every model, loaded or not."""
        return [model.card for model in self._models.values()]

    @property
    def loaded(self) -> Mapping[str, Served]:
        """The models that are in memory, by name."""
        with self._changed:
            stays = self._stays("loaded")
            return {stay.model.card.name: stay.served.result() for stay in stays}

    def load(self) -> None:
        """Describes all models and loads those of the start; the server is ready afterwards.

        Raises:
          Exception: what loading raises.
        """
        try:
            for model in self._models.values():
                if not model.source.at_start:
                    model.card = model.source.describe()
            for model in self._models.values():
                if model.source.at_start:
                    stay = self._join(model)
                    try:
                        stay.served.result()
                    finally:
                        self._leave(stay)
        except ModelUnavailable:
            return  # the server is ending
        except BaseException:
            self.state = "failed"
            raise
        self.state = "ready"

    @contextlib.asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[Served]:
        """A model that stays loaded within the block; loads it if need be.

        Raises:
          KeyError: there is no such model.
          ModelUnavailable: it does not load, or the server is ending.
        """
        stay = self._join(self._models[name])
        try:
            try:
                # All who wait share the future: one who is cancelled must not cancel it.
                served = await asyncio.shield(asyncio.wrap_future(stay.served))
            except ModelUnavailable:
                raise
            except Exception as error:
                raise ModelUnavailable(f"{name} does not load: {error_line(error)}") from None
            yield served
        finally:
            self._leave(stay)

    def stop_loading(self) -> None:
        """Requests that wait for a model are refused, as are those to come."""
        with self._changed:
            self._is_ending = True
            for model in self._models.values():
                for stay in (model.stay, model.next):
                    if stay is not None and not stay.served.done():
                        stay.served.set_exception(ModelUnavailable("the server is ending"))

    def close(self, timeout: float) -> bool:
        """Unloads all models; running texts go on for up to `timeout` seconds.

        Returns:
          Whether no model is being loaded any more.
        """
        deadline = time.monotonic() + timeout
        self.stop_loading()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_loading = bool(self._stays("loading"))
        if not is_loading:
            self._thread.join()
        for stay in self._stays("loaded"):
            self._unload(stay, max(0.0, deadline - time.monotonic()))
        return not is_loading

    def _stays(self, state: str) -> list[_Stay]:
        """The stays in a state; the one that was used least recently first."""
        stays = [model.stay for model in self._models.values() if model.stay is not None]
        return sorted((stay for stay in stays if stay.state == state), key=lambda s: s.used)

    def _join(self, model: _Model) -> _Stay:
        """The stay in which a request that comes now gets its model."""
        with self._changed:
            if self._is_ending:
                raise ModelUnavailable("the server is ending")
            stay = model.stay = model.stay or _Stay(model)
            if stay.is_leaving:
                stay = model.next = model.next or _Stay(model)
            stay.used = time.monotonic()
            if not stay.users and stay.state == "asked":
                stay.asked = stay.used
            stay.users += 1
            if stay.state == "asked":
                self._changed.notify_all()
            return stay

    def _leave(self, stay: _Stay) -> None:
        with self._changed:
            stay.users -= 1
            stay.used = time.monotonic()
            if not stay.users:
                self._changed.notify_all()

    def _run(self) -> None:
        while (task := self._next_task()) is not None:
            try:
                task()
            except Exception as error:  # of closing an engine; other models go on
                log_exception(error, "models")
            del task  # or what is unloaded would be named from here

    def _next_task(self) -> Callable[[], None] | None:
        """What is to be loaded or unloaded; waits for it. None when all ends."""
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                asked = [stay for stay in self._stays("asked") if stay.users]
                first = min(asked, key=lambda stay: stay.asked, default=None)
                loaded = self._stays("loaded")
                idle = [stay for stay in loaded if not stay.users]
                for stay in idle:
                    if stay.is_leaving or now - stay.used >= self._idle_seconds:
                        return functools.partial(self._unload, stay)
                ends = [stay.used + self._idle_seconds for stay in idle]
                if first is not None:
                    if len(loaded) < self._most:
                        first.state = "loading"
                        return functools.partial(self._load, first)
                    if idle:
                        return functools.partial(self._unload, idle[0])
                    if not any(stay.is_leaving for stay in loaded):
                        loaded[0].is_leaving = now - first.asked >= self._patience
                        ends.append(first.asked + self._patience)
                end = min(ends, default=math.inf)
                # A lock takes no longer time than this; to look again does no harm.
                self._changed.wait(min(max(0.0, end - now), threading.TIMEOUT_MAX))
            return None

    def _load(self, stay: _Stay) -> None:
        model, start = stay.model, time.monotonic()
        name = model.card.name
        try:
            served = model.source.load()
        except Exception as error:
            if isinstance(error, _EXPECTED):
                log("model not loaded", level=logging.ERROR, model=name, error=error_line(error))
            else:
                log_exception(error, name)
            # Frames of the traceback would keep what is in memory already.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            with self._changed:
                model.stay = None
                if not stay.served.done():
                    stay.served.set_exception(error)
            _give_memory_back()
            return
        _give_memory_back()
        with self._changed:
            is_wanted = not stay.served.done()  # it is done if the server is ending
            if is_wanted:
                model.card, stay.state, stay.used = served.card, "loaded", time.monotonic()
                stay.served.set_result(served)
            else:
                model.stay = None
        if is_wanted:
            log("model loaded", model=name, seconds=round(time.monotonic() - start, 3))
        else:
            served.engine.close(0.0)

    def _unload(self, stay: _Stay, timeout: float = 0.0) -> None:
        model = stay.model
        with self._changed:
            model.stay, model.next = model.next, None
        stay.served.result().engine.close(timeout)
        stay.served = Future()  # nobody waits for it any more
        _give_memory_back()
        log("model unloaded", model=model.card.name)


def _give_memory_back() -> None:
    """Frees what nobody names, and gives it back to the system."""
    gc.collect()  # an engine and its parts name each other
    # glibc keeps what is freed: for a model of 200 MB half of that and more, as much of a compiler.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
