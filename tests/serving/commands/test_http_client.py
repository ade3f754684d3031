"""The HTTP client before a real server: JSON, streams, errors, connections."""

import asyncio
import json

import pytest

from serving.commands.http_client import HttpClient, Refused

CHAT = "/v1/chat/completions"
ASKED = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}


def run(server, work, **options):
    async def whole():
        client = HttpClient(server.url, **options)
        try:
            return await work(client)
        finally:
            client.close()

    return asyncio.run(whole())


def test_a_connection_is_used_again(server):
    async def work(client):
        for _ in range(3):
            assert (await client.get("/v1/models"))["data"][0]["id"] == "scripted"
            async with client.post(CHAT, ASKED | {"stream": True}) as response:
                texts = [event["choices"][0]["delta"] async for event in response.events()]
            assert "".join(text.get("content", "") for text in texts) == "Some word"
            assert response.is_done
        return server.connections

    assert run(server, work) == 1


def test_leaving_a_stream_ends_the_request(server, engine):
    engine.pause = 0.05

    async def work(client):
        async with client.post(CHAT, ASKED | {"stream": True}) as response:
            async for _ in response.events():
                break
        while engine.running:
            await asyncio.sleep(0.01)
        assert (await client.get("/health"))["status"] == "ok"  # on another connection

    run(server, work)
    ((_, params),) = engine.asked
    assert params.max_tokens == 9


def test_errors_say_what_the_server_says(server, engine):
    async def answered(client):
        async with client.post(CHAT, ASKED | {"n": 0}) as response:
            await response.json()

    async def malformed(client):
        async with client.post(CHAT, b"{") as response:
            await response.json()

    async def in_a_stream(client):
        engine.error, engine.error_after = "the logits are NaN", 2
        async with client.post(CHAT, ASKED | {"stream": True}) as response:
            async for _ in response.events():
                pass

    for work, status, words in (
        (answered, 400, "n is 0"),
        (malformed, 400, "JSON"),
        (in_a_stream, 500, "the logits are NaN"),
        (lambda client: client.get("/nowhere"), 404, "/nowhere"),
    ):
        with pytest.raises(Refused, match=words) as refusal:
            run(server, work)
        assert refusal.value.status == status


def test_a_connection_that_the_server_has_closed_is_not_used(plain_server):
    async def work(client):
        for _ in range(3):
            await client.get("/v1/models")
        async with client.post(CHAT, {"stream": True}) as response:
            return [event["choices"][0]["delta"]["content"] async for event in response.events()]

    assert run(plain_server, work) == ["a", "b", "c"]


def test_an_end_in_the_middle_is_an_error():
    async def cut(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n"
        writer.write(head + b'data: {"a": 1}\n\n')
        writer.close()

    async def work():
        async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client, events = HttpClient(f"http://127.0.0.1:{port}"), []
            with pytest.raises(ConnectionError, match="closed"):
                async with client.post(CHAT, {}) as response:
                    async for event in response.events():
                        events.append(event)
            client.close()
            assert events == [{"a": 1}]

    asyncio.run(work())


def test_the_key_and_the_path_before_v1_are_sent():
    heads = []

    async def answer(reader, writer):
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        body = json.dumps({"data": []}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def work():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = HttpClient(f"http://127.0.0.1:{port}/some/place/v1/", "secret")
            assert await client.get("/v1/models") == {"data": []}
            client.close()

    asyncio.run(work())
    head = heads[0].decode().lower()
    assert head.startswith("get /some/place/v1/models http/1.1\r\n")
    assert "authorization: bearer secret\r\n" in head


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", ""])
def test_refuses_what_is_no_url_of_http(url):
    with pytest.raises(ValueError, match="must be like http://127.0.0.1:8000"):
        HttpClient(url)
