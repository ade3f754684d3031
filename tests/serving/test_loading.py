"""Checkpoints behind a server: honest cards, memory given back, errors that reach clients."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import signal
import subprocess
import sys
import threading
import weakref

import httpx
import jax
import pytest
from flax import nnx

import models
from models.config import DecoderConfig
from serving.api.app import build_app
from serving.api.server import HttpServer
from serving.arguments import ModelCommand, ModelOptions
from serving.equality import find_order
from serving.loading import Checkpoint, load_model
from serving.models_by_name import ModelsByName
from serving.request import SamplingParams

pytestmark = pytest.mark.usefixtures("quick_collection")

CONFIG = DecoderConfig(
    vocab=256, d_model=32, d_ff=64, layers=1, heads=2, kv_heads=1, context=64, tied=True
)
OPTIONS = ModelOptions(max_streams=2, lookup=False, load="asked")
PROGRAM = """
import sys, time
from serving.api.app import build_app
from serving.api.registry import ModelCard
from serving.api.server import HttpServer
from serving.models_by_name import ModelsByName, ModelSource
card = ModelCard(name="slow", context=8)
at_start = sys.argv[1] == "start"
load = lambda: (print("loading", flush=True), time.sleep(60))
source = ModelSource(card=card, at_start=at_start, describe=lambda: card, load=load)
models = ModelsByName([source])
server = HttpServer(build_app(models), port=0)
print(server.port, flush=True)
sys.exit(server.run(models.load))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, "a" and "b"."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        models.save(
            jax.jit(lambda seed=seed: models.Decoder(CONFIG, rngs=nnx.Rngs(seed)))(), folder / name
        )
    return folder


@pytest.fixture(autouse=True)
def programs(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.getbasetemp() / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


@pytest.fixture
def served(folder):
    """Starts a server of both checkpoints."""
    with contextlib.ExitStack() as stack:

        def start(**limits):
            found = [
                Checkpoint.find(ModelCommand(model=str(folder / name), options=OPTIONS))
                for name in "ab"
            ]
            named = ModelsByName([one.source() for one in found], **limits)
            server = HttpServer(build_app(named), port=0)
            server.start()
            stack.callback(server.stop)
            named.load()
            return server

        yield start


def complete(url, model, **fields):
    body = {"model": model, "prompt": "ab", "max_tokens": 4, "temperature": 0} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize("options", [{}, {"kv_tokens": 32, "weights": "int8"}])
def test_a_card_says_the_same_before_and_after_loading(folder, options):
    command = ModelCommand(model=str(folder / "a"), options=dataclasses.replace(OPTIONS, **options))
    checkpoint = Checkpoint.find(command)
    described = checkpoint.describe()
    loaded = checkpoint.load()
    loaded.engine.close()
    assert described == loaded.card and described.context == loaded.engine.max_tokens


def test_models_take_turns_in_memory_and_give_it_back(served):
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    server = served(max_loaded=1)
    named = server.app.interface.models
    listed = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["a", "b"]
    answers = [complete(server.url, name, logprobs=1).json()["choices"][0] for name in "aba"]
    assert answers[0] == answers[2] != answers[1]
    engine = weakref.ref(named.loaded["a"].engine)
    assert complete(server.url, "b").status_code == 200
    assert set(named.loaded) == {"b"} and engine() is None
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'wsekern_model_loaded{model="a"} 0' in metrics
    assert 'wsekern_model_loaded{model="b"} 1' in metrics
    assert complete(server.url, "c").status_code == 404
    named.close(0.0)
    assert not [array for array in jax.live_arrays() if id(array) not in before]


def test_a_model_that_does_not_load_is_said_to_who_asks_for_it(served, folder):
    server = served()
    weights = folder / "b" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    try:
        answer = complete(server.url, "b")
        assert answer.status_code == 503 and answer.json()["code"] == "model_unavailable"
        assert "b does not load: " in answer.json()["message"]
        assert "model.safetensors" in answer.json()["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        weights.write_bytes(whole)
    assert complete(server.url, "b").status_code == 200


def test_prompts_on_disk_are_of_each_model_by_its_name(folder, tmp_path):
    command = ModelCommand(model=str(folder / "a"), name="../x", options=OPTIONS)
    for cached in (0, 32):
        checkpoint = Checkpoint.find(command, prompt_folder=tmp_path, prompt_bytes=1_000_000)
        with checkpoint.load().engine as engine:
            generation = engine.submit([1] * 40, SamplingParams(max_tokens=2))
            list(generation)
        assert generation.usage.cached_tokens == cached
    assert [file.name for file in tmp_path.iterdir()] == ["..%2Fx.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["start", "asked"])
def test_a_signal_ends_a_server_that_loads(when):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, when],
        stdout=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            answers = list[httpx.Response]()
            ask = threading.Thread(target=lambda: answers.append(complete(url, "slow")))
            if when == "start":
                assert httpx.get(f"{url}/health").json() == {"status": "loading"}
            ask.start()
            assert process.stdout.readline() == "loading\n"
            if when == "start":
                ask.join()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            ask.join()
            assert answers[0].status_code == 503
            code = json.loads(answers[0].content)["code"]
            assert code == ("loading" if when == "start" else "server_ending")
        finally:
            process.kill()


def test_layers_of_a_small_model_lie_apart_and_its_products_have_equal_bits(folder):
    model = load_model(folder / "a", OPTIONS, None)
    assert not model.config.stacked and model.config.weights == find_order(CONFIG, "float32")
    rounded = load_model(folder / "a", dataclasses.replace(OPTIONS, weights="int8"), None)
    assert rounded.config.stacked
    options = dataclasses.replace(OPTIONS, weights="int8", activations="int8")
    assert not load_model(folder / "a", options, None).config.stacked


def test_a_draft_is_loaded_beside_its_model(folder):
    options = dataclasses.replace(OPTIONS, draft=str(folder / "b"))
    served = Checkpoint.find(ModelCommand(model=str(folder / "a"), options=options)).load()
    with served.engine as engine:
        (completion,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=6))
        assert len(completion.tokens) == 6
    assert engine.snapshot().totals["guessed_tokens"]
    missing = dataclasses.replace(OPTIONS, draft="/nowhere")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        Checkpoint.find(ModelCommand(model=str(folder / "a"), options=missing)).load()
