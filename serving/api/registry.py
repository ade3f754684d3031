"""The models that a server knows by name."""

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Protocol

from serving.text.model_text import ModelText

State = Literal["loading", "ready", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a server says of a model; known without loading it.

    Args:
      name: what clients call it.
      context: tokens of prompt and text together.
      created: when the server first knew it, in seconds since 1970.
      description: a sentence for people.
      tokenizer: its name.
      instruct_type: the family of its chat format; None: it has no chat template.
      reasoning: whether it writes its reasoning apart from its answer.
      tools: whether its chat format has tool calls.
      quantization: of the weights, as in "int8"; None: none.
      hugging_face_id: where it is from.
    """

    name: str
    context: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    description: str = ""
    tokenizer: str = "bytes"
    instruct_type: str | None = None
    reasoning: bool = False
    tools: bool = False
    quantization: str | None = None
    hugging_face_id: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that is loaded.

    Args:
      card: what is said of it.
      engine: makes its texts.
      text: turns requests into tokens, and tokens into answers.
      fingerprint: equal for servers that answer alike; `system_fingerprint` of each answer.
    """

    card: ModelCard
    engine: Any
    text: ModelText
    fingerprint: str


class ModelUnavailable(Exception):
    """A model is not in memory and cannot be loaded; says why."""


class Models(Protocol):
    """The models of a server; it may load them when they are asked for."""

    @property
    def state(self) -> State:
        """Whether requests can be answered: all models are loaded that are from the start."""

    @property
    def cards(self) -> Sequence[ModelCard]:
        """Every model that clients may ask for."""

    @property
    def loaded(self) -> Mapping[str, Served]:
        """The models that are in memory, by name."""

    def acquire(self, name: str) -> AbstractAsyncContextManager[Served]:
        """A model that stays loaded within the `async with` block.

        Raises:
          KeyError: there is no such model.
          ModelUnavailable: it does not load.
        """

    def stop_loading(self) -> None:
        """Requests that wait for a model to load are refused, as are those to come."""

    def close(self, timeout: float) -> bool:
        """Closes every engine; running texts go on for up to `timeout` seconds.

        Returns:
          Whether no model is being loaded any more; a thread that loads cannot be stopped.
        """


class LoadedModels:
    """Models that are in memory from the beginning to the end."""

    def __init__(self, served: Sequence[Served] = ()) -> None:
        self._served = {one.card.name: one for one in served}
        self.state: State = "ready"

    @property
    def cards(self) -> Sequence[ModelCard]:
        """Every model."""
        return [one.card for one in self._served.values()]

    @property
    def loaded(self) -> Mapping[str, Served]:
        """Every model, by name."""
        return self._served

    @contextlib.asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[Served]:
        """A model; KeyError: there is no such model."""
        yield self._served[name]

    def stop_loading(self) -> None:
        """Does nothing: no request waits."""

    def close(self, timeout: float) -> bool:
        """Closes every engine."""
        for one in self._served.values():
            one.engine.close(timeout)
        return True
