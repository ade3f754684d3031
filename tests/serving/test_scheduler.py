"""The order in which prompts are read; no model, no device."""

import numpy as np

from serving.pages import PagePool
from serving.request import SamplingParams
from serving.scheduler import Scheduler, Stream


def add(scheduler, name, tokens):
    scheduler.add(
        Stream(
            generation=name,
            params=SamplingParams(),
            prompt_tokens=tokens,
            text=np.zeros(tokens + 1, np.int32),
            length=tokens,
            seed=np.zeros(2, np.uint32),
            arrival=0,
        )
    )
    list(scheduler.admit())


def read(scheduler, chunk=32):
    """Reads a chunk of the next prompt; its name."""
    stream = scheduler.next_to_read()
    stream.computed = min(stream.computed + chunk, stream.length)
    stream.in_flight = int(stream.computed == stream.length)
    return stream.generation


def test_equal_prompts_are_read_one_after_another():
    scheduler = Scheduler(PagePool(64, 32), max_streams=3)
    for name in "abc":
        add(scheduler, name, 96)
    assert "".join(read(scheduler) for _ in range(9)) == "aaabbbccc"


def test_short_prompts_overtake_a_long_one_but_not_for_ever():
    scheduler = Scheduler(PagePool(64, 32), max_streams=40)
    add(scheduler, "long", 320)
    order = []
    for _ in range(20):  # a short one comes before each step
        add(scheduler, "short", 32)
        order.append(read(scheduler))
    first = order.index("long")
    assert 0 < first < 12 and order[:first] == ["short"] * first
