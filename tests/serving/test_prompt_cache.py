"""Prompts kept on disk: found again by an engine of the same model, and by no other."""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import models
import wsekern as wk
from models.config import DecoderConfig
from serving import prompt_cache
from serving.engine import Engine
from serving.prompt_cache import PromptCache, read_pages, write_pages
from serving.request import SamplingParams

CONFIG = DecoderConfig(
    vocab=256, d_model=32, d_ff=64, layers=2, heads=2, kv_heads=1, context=128, tied=True
)
PROMPT = np.random.default_rng(0).integers(0, 256, 50).tolist()
GREEDY = SamplingParams(max_tokens=8, logprobs=2)


def make_model(seed=0):
    return jax.jit(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def cache(tmp_path):
    return PromptCache(file=tmp_path / "prompts" / "tiny.safetensors", most_bytes=1_000_000)


@pytest.fixture
def ask(model, programs, cache):
    """What a new engine makes of the prompt, to the last bit, and how many tokens it finds."""

    def run(prompt=PROMPT, cache=cache, model=model, **options):
        sizes = {"max_streams": 2, "page_tokens": 8, "lookup": False, "folder": programs}
        with Engine(model, **(sizes | options), prompt_cache=cache) as engine:
            generation = engine.submit(prompt, GREEDY)
            deltas = list(generation)
        text: list[Any] = [token for delta in deltas for token in delta.tokens]
        text += [one for delta in deltas for one in delta.logprobs]
        return text, generation.usage.cached_tokens

    return run


@pytest.fixture
def logged(monkeypatch):
    lines: list[tuple[str, str]] = []
    monkeypatch.setattr(
        prompt_cache, "log", lambda event, **fields: lines.append((event, fields.get("reason", "")))
    )
    return lines


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_prompt_is_found_again_after_a_restart_with_the_same_text(ask, dtype):
    text, cached = ask(kv_dtype=dtype)
    assert cached == 0
    assert ask(kv_dtype=dtype) == (text, 48)
    # What was only read, and never used again, is kept on and on.
    other, _ = ask(PROMPT[::-1], kv_dtype=dtype)
    assert ask(kv_dtype=dtype) == (text, 48) and ask(PROMPT[::-1], kv_dtype=dtype) == (other, 48)


def test_more_streams_or_another_size_of_the_cache_change_nothing(ask):
    text, _ = ask()
    assert ask(kv_tokens=64, max_streams=1) == (text, 48)


@pytest.mark.parametrize(
    "wafer",
    [
        pytest.param(lambda: wk.Wafer.devices(2, 2), id="2x2"),
        pytest.param(lambda: wk.Wafer.virtual(wk.WSE2, height=2, width=2), id="virtual"),
    ],
)
def test_on_a_wafer(ask, wafer, logged):
    text, _ = ask(wafer=wafer())
    assert ask(wafer=wafer()) == (text, 48)
    assert ask()[1] == 0
    assert ("prompt cache ignored", "it is of another model, version or machine") in logged


def test_the_pages_that_were_used_last_are_kept(ask, cache):
    assert ask()[1] == 0
    size = cache.file.stat().st_size
    small = dataclasses.replace(cache, most_bytes=10_000 + (size - 800) // 2)
    ask(PROMPT[::-1], cache=small)
    assert cache.file.stat().st_size <= small.most_bytes
    (_, begun), (_, ended) = ask(PROMPT[::-1]), ask()
    assert begun > 0 and ended == 0


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"page_tokens": 16}, id="page"),
        pytest.param({"kv_dtype": "bfloat16"}, id="dtype"),
        pytest.param({"model": make_model(1)}, id="weights"),
    ],
)
def test_another_models_file_is_left_alone(ask, other, logged):
    ask()
    assert ask(**other)[1] == 0
    assert ("prompt cache ignored", "it is of another model, version or machine") in logged


def test_another_tokenizers_file_is_left_alone(ask, cache):
    ask()
    assert ask(cache=dataclasses.replace(cache, made_by="another"))[1] == 0


def test_one_weight_makes_another_model(ask, model):
    text, _ = ask()
    graph, params = nnx.split(model)
    changed = jax.tree.map(lambda x: x, params)
    scale = changed["norm"]["scale"]
    scale[...] = scale[...].at[0].add(1e-6)
    assert ask(model=nnx.merge(graph, changed))[1] == 0


def cut(data):
    return data[:-100]


def flip(place):
    def change(data):
        at = place if place >= 0 else len(data) + place
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "it is cut off"),
        (lambda data: data[:9], "it is damaged, or no prompt cache"),
        (lambda data: b"", "it is damaged, or no prompt cache"),
        (lambda data: b"\xff" * len(data), "it is damaged, or no prompt cache"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "it is damaged, or no prompt cache"),
        (lambda data: data.replace(b'"shape": [3, 16]', b'"shape": [3, 17]'), "it is damaged"),
        (lambda data: data.replace(b"[3, 100]", b"[9, 100]"), "it is cut off"),
        (flip(-1), "it is damaged"),  # a check
        (flip(-20), "it is damaged"),  # a page
        (flip(-320), "it is damaged"),  # a hash
    ],
)
def test_refuses_a_damaged_file(tmp_path, damage, reason):
    file = tmp_path / "x.safetensors"
    write_pages(file, "key", [bytes([n]) * 16 for n in range(3)], [b"a" * 100] * 3, 100)
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=reason):
        read_pages(file, "key")


def test_a_damaged_file_is_ignored_and_written_anew(ask, cache, logged):
    text, _ = ask()
    cache.file.write_bytes(cut(cache.file.read_bytes()))
    assert ask() == (text, 0)
    assert ("prompt cache ignored", "it is cut off") in logged
    assert ask() == (text, 48)


def test_what_is_no_file_is_ignored(ask, cache, logged):
    cache.file.mkdir(parents=True)
    assert ask()[1] == 0
    assert [event for event, _ in logged] == ["prompt cache ignored", "prompt cache not written"]


def test_a_disk_that_is_full_loses_the_cache_alone(ask, cache, logged, monkeypatch):
    text, _ = ask()

    @contextlib.contextmanager
    def fail(path):
        del path
        with open("/dev/full", "wb", buffering=0) as full:
            yield full

    monkeypatch.setattr(prompt_cache, "atomic_write", fail)
    assert ask(PROMPT[::-1])[1] == 0
    assert ("prompt cache not written", "No space left on device") in [
        (event, reason.partition(";")[0]) for event, reason in logged
    ]
    monkeypatch.undo()
    assert ask() == (text, 48)


def test_a_file_is_safetensors(tmp_path):
    file = tmp_path / "x.safetensors"
    hashes = [bytes([n]) * 16 for n in range(3)]
    write_pages(file, "key", hashes, [bytes([n]) * 10 for n in range(3)], 10)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and fields["__metadata__"]["key"] == "key"
    assert fields["checks"]["data_offsets"][1] == len(data) - 8 - length
    found, pages = read_pages(file, "key")
    assert found == hashes and pages.tolist() == [[n] * 10 for n in range(3)]
    with pytest.raises(ValueError, match="another model"):
        read_pages(file, "other")
