"""A server whose engine says what a test wants, and the two real clients."""

import contextlib

import cerebras.cloud.sdk
import openai
import pytest
from scripted_engine import ScriptedEngine, build_server

HELLO = "Hello there, how are you?"


def hello(prompt, params):
    del prompt, params
    return HELLO.encode()


@contextlib.contextmanager
def serve(engine, template=None, **settings):
    """A running server with one model, "scripted", on bytes."""
    server = build_server(engine, template, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def serving():
    """Starts servers with settings of a test's own."""
    return serve


@pytest.fixture(scope="module")
def shared_server():
    with serve(ScriptedEngine(hello), ping=0.2) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The module's server, its engine as at the beginning."""
    engine = ScriptedEngine(hello)
    shown = shared_server.engine = find_engine(shared_server)
    vars(shown).update({k: v for k, v in vars(engine).items() if k != "lock"})
    return shared_server


def find_engine(server):
    return server.app.interface.models.loaded["scripted"].engine


@pytest.fixture
def engine(server):
    return find_engine(server)


@pytest.fixture
def openai_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
def cerebras_client(server):
    client = cerebras.cloud.sdk.Cerebras(base_url=server.url, api_key="k", max_retries=0)
    with client:
        yield client
