"""Models by name: each loads once, when asked for; leaves when idle, never while in use."""

import asyncio
import contextlib
import threading
import time
import weakref

import pytest

from serving.api.registry import ModelCard, ModelUnavailable, Served
from serving.models_by_name import ModelsByName, ModelSource

pytestmark = pytest.mark.usefixtures("quick_collection")


class FakeEngine:
    is_alive = True

    def __init__(self):
        self.closed_with = None
        self.itself = self  # engines are in circles too

    def close(self, timeout):
        self.closed_with = timeout


class FakeModel:
    """A model whose loading can be held up, and can fail."""

    def __init__(self, name):
        self.name, self.loads, self.engines = name, 0, list[weakref.ref]()
        self.error: Exception | None = None
        self.may_load, self.is_loading = threading.Event(), threading.Event()
        self.may_load.set()

    def load(self):
        self.loads += 1
        self.is_loading.set()
        assert self.may_load.wait(10)
        self.is_loading.clear()
        if self.error is not None:
            raise self.error
        engine = FakeEngine()
        self.engines.append(weakref.ref(engine))
        card = ModelCard(name=self.name, context=8, tokenizer="loaded")
        text = None  # nobody asks for it here
        return Served(card=card, engine=engine, text=text, fingerprint="")  # type: ignore[arg-type]

    def source(self, *, at_start=False):
        return ModelSource(
            card=ModelCard(name=self.name, context=8),
            at_start=at_start,
            describe=lambda: ModelCard(name=self.name, context=8, tokenizer="described"),
            load=self.load,
        )

    @property
    def is_in_memory(self):
        return any(engine() is not None for engine in self.engines)


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def fakes():
    return {name: FakeModel(name) for name in "abc"}


@pytest.fixture
def named(fakes):
    """Makes the models; they are closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(at_start="", **limits):
            sources = [fake.source(at_start=fake.name in at_start) for fake in fakes.values()]
            models = ModelsByName(sources, **limits)
            stack.callback(models.close, 0.0)
            return models

        yield make


async def use(models, name):
    async with models.acquire(name) as served:
        return served.card.name


def test_models_of_the_start_are_loaded_and_all_are_listed(named, fakes):
    models = named(at_start="b")
    assert models.state == "loading"
    models.load()
    assert models.state == "ready" and set(models.loaded) == {"b"}
    assert [(card.name, card.tokenizer) for card in models.cards] == [
        ("a", "described"),
        ("b", "loaded"),
        ("c", "described"),
    ]
    with pytest.raises(KeyError):
        asyncio.run(use(models, "z"))


def test_what_fails_at_the_start_fails_it(named, fakes):
    fakes["a"].error = ValueError("no such tensor")
    models = named(at_start="a")
    with pytest.raises(ValueError, match="no such tensor"):
        models.load()
    assert models.state == "failed"


def test_first_requests_load_a_model_once_while_others_go_on(named, fakes):
    models = named(at_start="a")
    models.load()
    fakes["b"].may_load.clear()

    async def run():
        waiting = [asyncio.create_task(use(models, "b")) for _ in range(5)]
        await asyncio.to_thread(fakes["b"].is_loading.wait, 10)
        assert await use(models, "a") == "a"
        waiting[0].cancel()  # must not stop the others
        fakes["b"].may_load.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    cancelled, *others = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError) and others == ["b"] * 4
    assert fakes["b"].loads == 1 and models.loaded["b"].card.tokenizer == "loaded"


def test_a_load_goes_on_if_all_who_wait_leave(named, fakes):
    models = named()
    models.load()
    fakes["a"].may_load.clear()

    async def run():
        waiting = asyncio.create_task(use(models, "a"))
        await asyncio.to_thread(fakes["a"].is_loading.wait, 10)
        waiting.cancel()
        await asyncio.wait([waiting])

    asyncio.run(run())
    fakes["a"].may_load.set()
    wait_until(lambda: "a" in models.loaded)


def test_a_model_that_does_not_load_fails_its_requests_alone(named, fakes):
    models = named()
    models.load()
    fakes["a"].error = ValueError("the file is cut off")
    with pytest.raises(ModelUnavailable, match="a does not load: the file is cut off"):
        asyncio.run(use(models, "a"))
    assert models.state == "ready" and asyncio.run(use(models, "b")) == "b"
    fakes["a"].error = None
    assert asyncio.run(use(models, "a")) == "a"


def test_an_idle_model_leaves_memory(named, fakes):
    models = named(at_start="a", idle_seconds=0.02)
    models.load()
    wait_until(lambda: not models.loaded and not fakes["a"].is_in_memory)
    assert models.state == "ready" and asyncio.run(use(models, "a")) == "a"
    assert fakes["a"].loads == 2


def test_a_model_in_use_is_not_idle(named, fakes):
    models = named(idle_seconds=0.01)
    models.load()

    async def run():
        async with models.acquire("a"):
            await asyncio.sleep(0.1)
            assert fakes["a"].is_in_memory and "a" in models.loaded

    asyncio.run(run())
    wait_until(lambda: not fakes["a"].is_in_memory)


def test_the_least_recently_used_model_makes_room(named, fakes):
    models = named(max_loaded=2)
    models.load()
    for name in "aba":
        asyncio.run(use(models, name))
    asyncio.run(use(models, "c"))
    assert set(models.loaded) == {"a", "c"} and not fakes["b"].is_in_memory


def test_a_request_waits_for_room_until_a_model_is_free(named, fakes):
    models = named(max_loaded=1)
    models.load()

    async def run():
        async with models.acquire("a"):
            waiting = asyncio.create_task(use(models, "b"))
            await asyncio.sleep(0.05)
            assert not waiting.done() and set(models.loaded) == {"a"}
            assert await use(models, "a") == "a"  # it is there, so nobody waits for it
        return await waiting

    assert asyncio.run(run()) == "b" and not fakes["a"].is_in_memory


def test_a_model_that_is_always_in_use_lets_another_have_a_turn(named, fakes):
    models = named(max_loaded=1, patience=0.02)
    models.load()

    async def run():
        ends = asyncio.Event()

        async def hold():
            async with models.acquire("a"):
                await ends.wait()

        held = asyncio.create_task(hold())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(use(models, "b"))
        while not (model := models._models["a"]).stay or not model.stay.is_leaving:
            await asyncio.sleep(0.005)
        late = asyncio.create_task(use(models, "a"))
        await asyncio.sleep(0.02)
        assert not late.done() and not waiting.done()
        ends.set()
        return await asyncio.gather(waiting, late, held)

    assert asyncio.run(run())[:2] == ["b", "a"]
    assert [fakes[name].loads for name in "ab"] == [2, 1]


def test_an_end_refuses_who_waits_and_says_that_a_load_goes_on(named, fakes):
    models = named()
    models.load()
    fakes["a"].may_load.clear()

    async def run():
        waiting = asyncio.create_task(use(models, "a"))
        await asyncio.to_thread(fakes["a"].is_loading.wait, 10)
        models.stop_loading()
        with pytest.raises(ModelUnavailable, match="ending"):
            await waiting
        with pytest.raises(ModelUnavailable, match="ending"):
            await use(models, "b")

    asyncio.run(run())
    assert not models.close(0.0)
    fakes["a"].may_load.set()
    wait_until(lambda: fakes["a"].engines and not models._thread.is_alive())
    assert not models.loaded and models.close(0.0)


def test_an_end_while_the_start_loads_is_no_failure(named, fakes):
    models = named(at_start="ab")
    fakes["a"].may_load.clear()
    start = threading.Thread(target=models.load)
    start.start()
    assert fakes["a"].is_loading.wait(10)
    models.stop_loading()
    start.join(10)
    assert not start.is_alive() and models.state == "loading" and not fakes["b"].loads
    fakes["a"].may_load.set()


def test_a_close_gives_running_texts_their_time(named, fakes):
    models = named(at_start="a")
    models.load()
    engine = models.loaded["a"].engine
    assert models.close(3.0)
    assert engine.closed_with == pytest.approx(3.0, abs=0.5) and not models.loaded


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two models are called 'a'"):
        ModelsByName([FakeModel("a").source(), FakeModel("a").source()])
