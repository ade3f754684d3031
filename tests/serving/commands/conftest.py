"""A server whose engine says what a test wants, and one that speaks the least of the API."""

import http.server
import json
import threading

import pytest
from scripted_engine import ScriptedEngine, build_server

TEXT = b"Some words that a model says, one letter a token, again and again and again."


@pytest.fixture
def engine():
    return ScriptedEngine(lambda prompt, params: TEXT)


@pytest.fixture
def server(engine):
    server = build_server(engine)
    server.start()
    yield server
    server.stop()


class PlainServer(http.server.ThreadingHTTPServer):
    """Keeps what it is asked; may leave out the mark at a stream's end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), PlainHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.bodies: list[dict] = []
        self.cuts = False


class PlainHandler(http.server.BaseHTTPRequestHandler):
    """Streams three pieces of text, counts no tokens, and refuses `min_tokens`."""

    server: PlainServer

    def do_GET(self):
        self._send(200, json.dumps({"data": [{"id": "plain"}]}).encode(), "application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if "min_tokens" in body:
            error = {"error": {"message": "unknown field: min_tokens", "code": "unknown"}}
            self._send(400, json.dumps(error).encode(), "application/json")
            return
        chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "b", "c")]
        events = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks)
        end = "" if self.server.cuts else "data: [DONE]\n\n"
        self._send(200, (": a comment\n\n" + events + end).encode(), "text/event-stream")

    def _send(self, status, data, kind):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def plain_server():
    """As another program's: HTTP/1.0, where the end of the connection ends the answer."""
    server = PlainServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
