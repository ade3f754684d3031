"""What every route has in common, and the routes that make no text."""

import io
import json
import logging
import time
from typing import Any

import cerebras.cloud.sdk
import httpx
import openai
import pytest

from serving.api.logs import log, write_logs

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "a secret"}]}


def test_the_models_are_listed(openai_client, cerebras_client):
    for client in (openai_client, cerebras_client):
        (model,) = client.models.list().data
        assert (model.id, model.object, model.owned_by) == ("scripted", "model", "wsekern")
        assert client.models.retrieve("scripted").id == "scripted"
    with pytest.raises(openai.NotFoundError) as refusal:
        openai_client.models.retrieve("other/model")
    assert refusal.value.code == "model_not_found"
    with pytest.raises(cerebras.cloud.sdk.NotFoundError):
        cerebras_client.chat.completions.create(**ASKED | {"model": "other"})


def test_the_forms_of_a_model_record(cerebras_client, server):
    routed = cerebras_client.models.list(format="openrouter")
    assert routed.data[0].context_length == 4096 and routed.data[0].pricing.prompt == "0"
    hugging = cerebras_client.models.list(format="huggingface")
    assert hugging.data[0].capabilities.vision is False
    assert httpx.get(f"{server.url}/v1/models?format=x").json()["param"] == "format"


def test_the_public_record_says_what_the_model_can_do(server):
    record = httpx.get(f"{server.url}/public/v1/models/scripted").json()
    assert record["limits"]["max_context_length"] == 4096
    assert record["capabilities"]["streaming"] and not record["capabilities"]["vision"]
    assert record["architecture"]["tokenizer"] == "bytes"
    listed = httpx.get(f"{server.url}/public/v1/models").json()
    assert listed["data"] == [record]


@pytest.mark.parametrize("prefix", ["/v1", "/v1/v1", "/v1/v1/v1"])
def test_a_base_url_may_have_the_version_or_not(server, prefix):
    assert httpx.get(f"{server.url}{prefix}/models").status_code == 200
    with openai.OpenAI(base_url=f"{server.url}{prefix}", api_key="k") as client:
        assert client.chat.completions.create(**ASKED).choices


def test_a_connection_is_warmed_quickly_and_not_counted(server):
    answer = httpx.get(f"{server.url}/v1/tcp_warming")
    assert answer.status_code == 200
    assert "tcp_warming" not in httpx.get(f"{server.url}/metrics").text


def test_what_is_asked_every_second_is_not_counted(server):
    for path in ("/slots", "/health", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
        assert f'route="{path}"' not in httpx.get(f"{server.url}/metrics").text


def test_other_methods_and_paths_fail_in_the_same_form(server):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
        ("BREW", "/v1/models", 405),
        ("GET", "/nope", 404),
        ("POST", "/v1/models/", 405),
        ("GET", "/v1/models/", 404),
    ):
        answer = httpx.request(method, server.url + path)
        body = answer.json()
        assert answer.status_code == status and body["error"]["message"] == body["message"]
        assert ("allow" in answer.headers) == (status == 405)
    head = httpx.head(f"{server.url}/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405
    options = httpx.options(f"{server.url}/v1/models")
    assert options.status_code == 204 and "GET" in options.headers["allow"]
    assert httpx.options(f"{server.url}/nope").status_code == 404


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:5"])
def test_pages_of_this_machine_may_use_the_server(server, origin):
    headers = {"origin": origin, "access-control-request-method": "POST"}
    answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert answer.headers["access-control-allow-origin"] == origin
    assert "authorization" in answer.headers["access-control-allow-headers"]
    chat = f"{server.url}/v1/chat/completions"
    answer = httpx.post(chat, json=ASKED, headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin


def test_pages_of_others_may_not(server):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    chat = f"{server.url}/v1/chat/completions"
    assert "access-control-allow-origin" not in httpx.options(chat, headers=headers).headers
    answer = httpx.post(chat, json=ASKED, headers={"origin": "https://evil.example"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    for origin in ("null", "http://localhost.evil.example", "http://[", "x"):
        assert httpx.post(chat, json=ASKED, headers={"origin": origin}).status_code == 403


def test_requests_have_ids(server):
    url = f"{server.url}/health"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    bad: Any
    for bad in ("a b", 'x"y', "x" * 200, "\u00e9".encode()):
        given = httpx.get(url, headers={"x-request-id": bad}).headers["x-request-id"]
        assert given.startswith("req-")


def test_the_metrics_count_requests_tokens_and_times(server, openai_client):
    before = _metrics(server)
    openai_client.chat.completions.create(**ASKED, n=2, max_tokens=4)
    after = _metrics(server)

    def grown(name):
        return after[name] - before.get(name, 0)

    route = 'route="/v1/chat/completions",method="POST",status="200"'
    assert grown(f"wsekern_requests_total{{{route}}}") == 1
    assert grown('wsekern_completion_tokens_total{model="scripted"}') == 8
    assert grown('wsekern_finishes_total{model="scripted",reason="length"}') == 2
    assert grown("wsekern_time_to_first_token_seconds_count") == 2
    assert grown("wsekern_time_per_token_seconds_count") == 6
    assert after['wsekern_pages_total{model="scripted"}'] == 64
    assert after['wsekern_engine_steps_total{model="scripted"}'] == 3


def _metrics(server):
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_slots_are_shown(server, engine, openai_client):
    assert [slot["is_processing"] for slot in httpx.get(f"{server.url}/slots").json()] == [
        False
    ] * 4
    engine.pause = 0.05
    stream = openai_client.chat.completions.create(**ASKED, stream=True)
    next(iter(stream))
    slots = httpx.get(f"{server.url}/slots").json()
    assert [slot["is_processing"] for slot in slots] == [True, False, False, False]
    full = httpx.get(f"{server.url}/slots?format=full").json()
    (model,) = full["models"]
    assert full["state"] == "ready"
    assert len(model["slots"]) == 1 and model["pages_total"] == 64
    assert len(model["page_kinds"]) == 64 and model["grid"] == [1, 1]
    stream.close()


def test_while_the_model_loads(server):
    models = server.app.interface.models
    models.state = "loading"
    try:
        answer = httpx.get(f"{server.url}/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        chat = httpx.post(f"{server.url}/v1/chat/completions", json=ASKED)
        assert chat.status_code == 503 and "retry-after" in chat.headers
    finally:
        models.state = "ready"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_an_engine_that_has_failed_is_seen(server, engine):
    engine.is_alive = False
    answer = httpx.get(f"{server.url}/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")


@pytest.fixture
def lines():
    """The log, as it is written meanwhile."""
    stream = io.StringIO()
    write_logs(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for name in ("serving", "uvicorn"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)


def line_of(lines, name):
    """The log's line of a request, which may come after its answer."""
    for _ in range(200):
        if found := [line for line in lines() if line.get("id") == name]:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no line of {name}")


def test_the_log_has_a_line_for_each_request_and_no_text(server, lines):
    chat = f"{server.url}/v1/chat/completions"
    httpx.post(chat, json=ASKED, headers={"x-request-id": "mine-2"})
    httpx.post(chat, json=ASKED | {"temperature": 9}, headers={"x-request-id": "mine-3"})
    good, bad = (line_of(lines, f"mine-{i}") for i in (2, 3))
    assert (good["event"], good["status"], good["model"]) == ("request", 200, "scripted")
    assert good["prompt_tokens"] == len("user: a secret\nassistant:") and good["seconds"] > 0
    assert bad["status"] == 400 and "temperature" in bad["error"]
    assert "secret" not in json.dumps(lines()) and "Hello" not in json.dumps(lines())


def test_the_log_has_text_if_that_is_wished(serving, server, engine, lines):
    with serving(engine, log_prompts=True) as other:
        httpx.post(f"{other.url}/v1/chat/completions", json=ASKED)
        httpx.post(f"{other.url}/v1/completions", json={"model": "scripted", "prompt": "another"})
    text = json.dumps(lines())
    assert "a secret" in text and "another" in text and "Hello there" in text


def test_nobody_can_write_lines_of_the_log(lines):
    log("request", path='/a\n{"event": "forged"}\r\x1b[31m')
    (line,) = lines()
    assert line["event"] == "request" and "forged" in line["path"]
