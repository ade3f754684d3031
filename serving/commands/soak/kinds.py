"""The kinds of requests that a soak sends: what clients ask well, badly, and leave."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serving.commands.bench.prompts import words

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_MOST_TOKENS = 48  # of an answer, so that many requests come and go
_SYSTEMS = ("You are brief.", "You are a helpful assistant who answers in one line.", "")
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "is_big": {"type": "boolean"}},
    "required": ["name", "is_big"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": _SCHEMA, "strict": True},
}


class Shot(NamedTuple):
    """A request, and what the client does with the answer."""

    path: str
    body: Any  # an object, or bytes that are sent as they are; None: a GET
    is_good: bool = True  # whether it must be answered; else it must be refused
    leaves_after: float | None = None  # seconds until the client goes away
    pause: float = 0.0  # seconds between two events that the client reads


class Asker:
    """Makes requests to one model.

    Args:
      model: what the server calls it.
      context: tokens of a prompt and its answer together.
    """

    def __init__(self, model: str, context: int) -> None:
        self.model, self._context = model, context
        kinds: dict[str, tuple[float, Callable[[random.Random], Shot]]] = {
            "chat": (4, self._chat),
            "completion": (3, self._completion),
            "response": (1, self._response),
            "several": (1, self._several),
            "tools": (2, self._tools),
            "schema": (2, self._schema),
            "long prompt": (1, self._long),
            "leaves": (3, self._leaves),
            "reads slowly": (0.5, self._reads_slowly),
            "bad input": (3, self._bad),
            "status": (0.5, self._status),
        }
        self._makers = {name: make for name, (_, make) in kinds.items()}
        self._shares = [share for share, _ in kinds.values()]

    @property
    def kinds(self) -> Sequence[str]:
        """The names of all kinds."""
        return list(self._makers)

    def choose(self, rng: random.Random) -> str:
        """A random kind; some come more often."""
        return rng.choices(self.kinds, self._shares)[0]

    def make(self, kind: str, rng: random.Random) -> Shot:
        """A random request of a kind."""
        return self._makers[kind](rng)

    def _shared(self, rng: random.Random) -> dict[str, Any]:
        most = max(1, min(_MOST_TOKENS, self._context // 4))
        fields: dict[str, Any] = {"model": self.model, "max_tokens": rng.randint(1, most)}
        fields["stream"] = rng.random() < 0.5
        if rng.random() < 0.5:
            fields |= {"temperature": 0.0}
        else:
            fields |= {"temperature": rng.uniform(0.1, 1.5), "top_p": rng.uniform(0.5, 1.0)}
        if rng.random() < 0.2:
            fields["seed"] = rng.randrange(1000)
        if rng.random() < 0.1:
            fields |= {"frequency_penalty": 0.5, "presence_penalty": 0.2}
        if rng.random() < 0.1:
            fields["stop"] = ["e", " the"]
        return fields

    def _messages(self, rng: random.Random) -> list[dict[str, str]]:
        system = rng.choice(_SYSTEMS)
        begin = [{"role": "system", "content": system}] if system else []
        most = max(2, self._context // 64)
        turns = [{"role": "user", "content": words(rng.randint(1, min(40, most)), rng)}]
        if rng.random() < 0.3:
            turns.append({"role": "assistant", "content": words(2, rng)})
            turns.append({"role": "user", "content": words(2, rng)})
        return begin + turns

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randrange(32, 127) for _ in range(count)]

    def _chat(self, rng: random.Random) -> Shot:
        body = self._shared(rng) | {"messages": self._messages(rng)}
        if rng.random() < 0.1:
            body |= {"logprobs": True, "top_logprobs": 3}
        return Shot(CHAT, body)

    def _completion(self, rng: random.Random) -> Shot:
        body = self._shared(rng) | {"prompt": words(rng.randint(1, 20), rng)}
        if rng.random() < 0.5:
            body["prompt"] = self._tokens(rng, rng.randint(1, max(1, self._context // 4)))
        return Shot(COMPLETIONS, body)

    def _response(self, rng: random.Random) -> Shot:
        tokens = rng.randint(16, _MOST_TOKENS)
        body = {"model": self.model, "input": words(8, rng), "max_output_tokens": tokens}
        return Shot(RESPONSES, body | {"stream": rng.random() < 0.5})

    def _several(self, rng: random.Random) -> Shot:
        if rng.random() < 0.5:
            return Shot(CHAT, self._shared(rng) | {"messages": self._messages(rng), "n": 3})
        prompts = [self._tokens(rng, 10) for _ in range(3)]
        return Shot(COMPLETIONS, self._shared(rng) | {"prompt": prompts})

    def _tools(self, rng: random.Random) -> Shot:
        body = self._shared(rng) | {"messages": self._messages(rng), "tools": [_TOOL]}
        return Shot(CHAT, body | {"tool_choice": rng.choice(["auto", "required", "none"])})

    def _schema(self, rng: random.Random) -> Shot:
        # A name of its own in each request: grammars that are kept must not pile up.
        schema = _SCHEMA | {"description": f"number {rng.randrange(10**6)}"}
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
        body = self._shared(rng) | {"messages": self._messages(rng), "response_format": form}
        return Shot(CHAT, body)

    def _long(self, rng: random.Random) -> Shot:
        most = max(1, self._context - _MOST_TOKENS)
        prompt = self._tokens(rng, rng.randint(max(1, most // 2), most))
        return Shot(COMPLETIONS, self._shared(rng) | {"prompt": prompt})

    def _leaves(self, rng: random.Random) -> Shot:
        shot = self.make(rng.choice(["chat", "completion", "several", "long prompt"]), rng)
        body = shot.body | {"max_tokens": max(1, self._context // 2)}
        return shot._replace(body=body, leaves_after=rng.expovariate(2.0))

    def _reads_slowly(self, rng: random.Random) -> Shot:
        shot = self._chat(rng)
        return shot._replace(body=shot.body | {"stream": True}, pause=rng.uniform(0.01, 0.1))

    def _status(self, rng: random.Random) -> Shot:
        paths = ("/health", "/metrics", "/slots", "/v1/models", "/public/v1/models")
        return Shot(rng.choice(paths), None)

    def _bad(self, rng: random.Random) -> Shot:
        good = self._shared(rng) | {"messages": [{"role": "user", "content": "Hi"}]}
        user = {"role": "user"}
        wrong: list[dict[str, Any]] = [
            {"model": "nobody"},
            {"messages": []},
            {"messages": "Hi"},
            {"messages": [{"role": "king", "content": "Hi"}]},
            {"messages": [user | {"content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            {"messages": [user | {"content": "x" * 60 * self._context}]},
            {"temperature": 9},
            {"max_tokens": 10**9},
            {"n": 1000},
            {"stop": ["a"] * 9},
            {"logit_bias": {"999999999": 1}},
            {"top_logprobs": 50, "logprobs": True},
            {"unknown_field": 1},
            {"stream": "yes"},
            {"tool_choice": "required"},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 1}}},
        ]
        bodies: list[Any] = [good | fields for fields in wrong]
        whole = json.dumps(good).encode()
        bodies += [whole[:-5], b"\xff\xfe", b"null", b"[" * 5000, whole.replace(b"Hi", b"\xc3")]
        if rng.random() < 0.1:
            return Shot("/v1/nowhere", good, is_good=False)
        return Shot(CHAT, rng.choice(bodies), is_good=False)
