"""This file is a tokenizer: text to tokens and back, and the turns of a chat as one text."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from models.text.template import render

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Codec(Protocol):
    """What turns text into tokens and back; `tokenizers.Tokenizer` does, behind `FastCodec`."""

    @property
    def size(self) -> int:
        """One more than the highest token."""

    @property
    def definition(self) -> str:
        """All that decides its tokens."""

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text; `special` adds those that begin and end one."""

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of tokens, with or without those that are no text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A checkpoint's tokenizer; `models.text.reading.load_tokenizer` makes one."""

    codec: Codec
    ends: tuple[int, ...] = ()  # tokens that end a text
    template: str | None = None  # of chats, in Jinja
    names: dict[str, Any] = dataclasses.field(default_factory=dict)  # for it: bos_token, ...
    source: str = ""  # where it was read from, for messages

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return self.codec.size

    @property
    def fingerprint(self) -> str:
        """The same for tokenizers that make the same tokens of every text."""
        return hashlib.sha256(f"{self.codec.definition} {self.ends}".encode()).hexdigest()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of `text`.

        Args:
          text: any; the names of special tokens in it are those tokens.
          special: whether to add what the tokenizer begins and ends a text with.
        """
        return self.codec.encode(text, special)

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of `tokens`; bytes that are no character become U+FFFD.

        Args:
          tokens: any.
          special: whether special tokens are written out by name.
        """
        return self.codec.decode([int(token) for token in tokens], special)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The tokens of a chat, as the checkpoint's template writes it.

        Args:
          messages: `{"role": .., "content": ..}` each.
          tools: what the model may call, as JSON schemas.
          add_generation_prompt: whether to begin the assistant's turn.

        Raises:
          ValueError: there is no template, or it fails.
        """
        if self.template is None:
            raise ValueError(f"{self.source or 'the tokenizer'} has no chat template; use a prompt")
        text = render(
            self.template,
            {
                **self.names,
                "messages": list(messages),
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
            self.source,
        )
        return self.encode(text, special=False)

    def check(self, vocab: int) -> None:
        """Raises ValueError where a model of `vocab` words does not know every token."""
        if self.vocab > vocab:
            raise ValueError(
                f"{self.source or 'the tokenizer'} has {self.vocab} tokens, the model knows "
                f"{vocab}: they are not of one checkpoint"
            )

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json; nothing where tokens are bytes."""
        if not isinstance(self.codec, FastCodec):
            return
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names}
        if self.template is not None:
            settings["chat_template"] = self.template
        self.codec.inner.save(str(folder / "tokenizer.json"))
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.ends:
            ends = json.dumps({"eos_token_id": list(self.ends)}, indent=2)
            (folder / "generation_config.json").write_text(ends, encoding="utf-8")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of `tokens` as they come, a piece for each; a character is never split.

        A piece is empty while a character is not complete; what is left at the end comes last.
        """
        seen: list[int] = []
        begin = done = 0  # decoded from `begin`, written up to `done`
        for token in tokens:
            seen.append(int(token))
            before, now = self.decode(seen[begin:done]), self.decode(seen[begin:])
            if now.endswith(_BROKEN) or len(now) <= len(before):
                yield ""
                continue
            yield now[len(before) :]
            # The last piece is decoded again with the next: some put a space before a word only
            # where another word stands before it.
            begin, done = done, len(seen)
        yield self.decode(seen[begin:])[len(self.decode(seen[begin:done])) :]


@dataclasses.dataclass(frozen=True)
class FastCodec:
    """A `tokenizers.Tokenizer`."""

    inner: Any

    @property
    def size(self) -> int:
        """One more than the highest token."""
        return max(self.inner.get_vocab().values(), default=-1) + 1

    @property
    def definition(self) -> str:
        """All that decides its tokens."""
        return self.inner.to_str()

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of tokens."""
        return self.inner.decode(list(tokens), skip_special_tokens=not special)


@dataclasses.dataclass(frozen=True)
class ByteCodec:
    """A token for each byte of UTF-8: what models without a tokenizer read."""

    size: int = 256
    definition: str = "bytes"

    def encode(self, text: str, special: bool) -> list[int]:
        """The bytes of a text."""
        del special
        return list(text.encode())

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of bytes; what is none is left out."""
        del special
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")


def bytes_tokenizer() -> Tokenizer:
    """The tokenizer of models that read bytes."""
    return Tokenizer(codec=ByteCodec(), source="bytes")
