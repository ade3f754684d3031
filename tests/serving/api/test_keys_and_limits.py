"""Keys and rate limits, by themselves and as clients meet them."""

import base64
from typing import Any

import cerebras.cloud.sdk
import httpx
import openai
import pytest
from scripted_engine import ScriptedEngine

from serving.api.errors import ApiError
from serving.api.limits import Limiter
from serving.api.settings import RateLimits

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def guarded(serving):
    engine = ScriptedEngine(lambda prompt, params: b"Hello")
    with serving(engine, keys=frozenset({"key-one", "key-two"})) as server:
        yield server


@pytest.mark.parametrize("key", ["key-one", "key-two"])
def test_each_key_opens(guarded, key):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key)
    with client:
        assert client.chat.completions.create(**ASKED).choices[0].message.content == "Hello"


@pytest.mark.parametrize("key", ["key-on", "key-onee", "KEY-ONE", "x"])
def test_a_wrong_key(guarded, key):
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key) as one,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        one.models.list()
    assert (refusal.value.code, refusal.value.param) == ("wrong_api_key", "api_key")
    with (
        cerebras.cloud.sdk.Cerebras(base_url=guarded.url, api_key=key) as other,
        pytest.raises(cerebras.cloud.sdk.AuthenticationError),
    ):
        other.chat.completions.create(**ASKED)


ROUTES = ["/v1/models", "/public/v1/models", "/metrics", "/slots", "/v1/tcp_warming", "/nope"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("header", ["", "Bearer", "Token key-one", "Basic ???"])
def test_without_a_key_only_the_health_is_told(guarded, path, header):
    answer = httpx.get(guarded.url + path, headers={"authorization": header})
    assert answer.status_code == 403 and answer.json()["detail"] == "Not authenticated"
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_a_browser_gives_the_key_as_a_password(guarded):
    answer = httpx.get(f"{guarded.url}/")
    assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
    # The page asks for a key itself, so nothing that it fetches may open the browser's dialog.
    wrong = httpx.get(f"{guarded.url}/slots", headers={"authorization": "Bearer wrong"})
    assert wrong.status_code == 401 and "Basic" not in wrong.headers["www-authenticate"]
    basic = base64.b64encode(b"me:key-two").decode()
    headers = {"authorization": f"Basic {basic}"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_bucket_fills_evenly():
    clock = Clock()
    limiter = Limiter(RateLimits(requests_minute=2), clock)
    limiter.charge("a", 0)
    assert limiter.charge("a", 0).headers["x-ratelimit-remaining-requests-minute"] == "0"
    with pytest.raises(ApiError) as refusal:
        limiter.charge("a", 0)
    assert refusal.value.status == 429 and refusal.value.code == "request_quota_exceeded"
    assert refusal.value.headers["retry-after"] == "30"
    limiter.charge("b", 0)  # another key has buckets of its own
    clock.now = 30.0
    limiter.charge("a", 0)


def test_tokens_are_charged_before_and_given_back_after():
    limiter = Limiter(RateLimits(tokens_minute=100, total_tokens_minute=300), Clock())
    charge = limiter.charge("a", 80)
    with pytest.raises(ApiError, match="tokens per minute") as refusal:
        limiter.charge("a", 30)
    assert refusal.value.code == "token_quota_exceeded"
    limiter.settle(charge, used=60, cached=50)
    headers = limiter.charge("a", 0).headers
    assert headers["x-ratelimit-remaining-tokens-minute"] == "90"
    assert headers["x-ratelimit-remaining-total-tokens-minute"] == "240"


def test_what_never_fits_is_not_tried_again():
    with pytest.raises(ApiError) as refusal:
        Limiter(RateLimits(tokens_day=100)).charge("a", 101)
    assert refusal.value.headers["x-should-retry"] == "false"
    assert "retry-after" not in refusal.value.headers


def test_a_refused_request_takes_nothing():
    limiter = Limiter(RateLimits(requests_day=5, tokens_day=100), Clock())
    for _ in range(9):
        with pytest.raises(ApiError):
            limiter.charge("a", 101)
    assert limiter.charge("a", 1).headers["x-ratelimit-remaining-requests-day"] == "4"


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="tokens_day=0"):
        RateLimits(tokens_day=0)


def test_clients_see_the_limits(serving):
    limits = RateLimits(requests_minute=2, tokens_day=10_000)
    with (
        serving(ScriptedEngine(lambda prompt, params: b"Hello"), limits=limits) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client,
    ):
        raw = client.chat.completions.with_raw_response.create(**ASKED)
        assert raw.headers["x-ratelimit-limit-tokens-day"] == "10000"
        assert raw.headers["x-ratelimit-remaining-requests-minute"] == "1"
        used = len("user: Hi\nassistant:Hello")
        raw = client.chat.completions.with_raw_response.create(**ASKED, max_tokens=10)
        left = int(raw.headers["x-ratelimit-remaining-tokens-day"])
        assert left == pytest.approx(10_000 - used - used - 5, abs=1)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.chat.completions.create(**ASKED)
        assert float(refusal.value.response.headers["retry-after"]) <= 30
