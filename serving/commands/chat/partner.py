"""Who answers in a chat: a server, or a model in this process."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from serving.commands.chat.arguments import DEFAULT_URL, ChatCommand
from serving.commands.chunks import Chunk, read_chunk
from serving.commands.http_client import HttpClient, Refused
from wsekern.progress import show_progress
from wsekern.wafer.launch import prepare_devices

Messages = Sequence[Mapping[str, str]]


class Partner(Protocol):
    """Answers the messages of a chat."""

    name: str

    def answer(self, messages: Messages) -> AsyncGenerator[Chunk, None]:
        """The answer as it is made; the last chunk has the usage, if it is known.

        Raises:
          Refused: the messages are too long, or a field is wrong.
          OSError: the server has gone.
        """

    async def close(self) -> None:
        """Ends connections, or the model."""


class Server:
    """A model behind the API.

    Args:
      command: says where.
    """

    def __init__(self, command: ChatCommand) -> None:
        self.name = command.model or ""
        self._fields = command.fields
        self._client = HttpClient(command.url or DEFAULT_URL, command.api_key)

    async def find_model(self) -> None:
        """Takes the first model that the server lists, unless the command names one.

        Raises:
          ValueError: it lists none.
          Refused: the key is wrong.
          OSError: no server is there.
        """
        listed = (await self._client.get("/v1/models")).get("data") or []
        if not self.name and not listed:
            raise ValueError(f"{self._client.url} lists no model; name one with --model")
        self.name = self.name or listed[0]["id"]

    async def answer(self, messages: Messages) -> AsyncGenerator[Chunk, None]:
        """See `Partner`."""
        body: dict[str, Any] = {"model": self.name, "messages": list(messages), "stream": True}
        body |= {"stream_options": {"include_usage": True}} | self._fields
        async with self._client.post("/v1/chat/completions", body) as response:
            async for event in response.events():
                yield read_chunk(event)

    async def close(self) -> None:
        """Closes the connection."""
        self._client.close()


class LocalModel:
    """A model in this process; takes the same fields as a server.

    Args:
      command: says which.

    Raises:
      ValueError: it does not load.
      FileNotFoundError: there is no such model.
    """

    def __init__(self, command: ChatCommand) -> None:
        prepare_devices(1, command.platform)
        # jax may be imported from here on.
        from serving.arguments import ModelCommand, ModelOptions
        from serving.loading import Checkpoint
        from wsekern.wafer.launch import find_devices

        assert command.model is not None
        find_devices(command.platform)  # refuses a platform that is not there
        options = ModelOptions(max_streams=1, dtype=command.dtype, weights=command.weights)
        checkpoint = Checkpoint.find(ModelCommand(model=command.model, options=options))
        self.name = checkpoint.name
        self._fields = command.fields
        with show_progress(f"loading {self.name}"):
            self._served = checkpoint.load()

    async def answer(self, messages: Messages) -> AsyncGenerator[Chunk, None]:
        """See `Partner`."""
        from serving.api import fields
        from serving.api.chat_request import prepare_chat
        from serving.api.errors import ApiError, as_api_error
        from serving.session import GenerationFailed, Session, join

        body = {"model": self.name, "messages": list(messages)} | self._fields
        try:
            asked = fields.chat(body, "")
            job = await asyncio.to_thread(prepare_chat, asked, self._served, most_choices=1)
            session = Session(self._served.engine, job.texts)
            try:
                async for _, piece in session.pieces():
                    content, reasoning, _ = join([piece])
                    yield Chunk(content, reasoning, finish=piece.finish)
                yield Chunk(usage={"completion_tokens": session.completion_tokens})
            finally:
                session.cancel()
        except (ApiError, GenerationFailed) as error:
            known = as_api_error(error)
            raise Refused(known.status, known.message, known.code) from error

    async def close(self) -> None:
        """Ends the engine."""
        self._served.engine.close(0.0)
