"""A tokenizer: text to tokens and back, and a chat's messages to tokens."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from models.checkpoints.json_file import shown
from models.text.template import plain_data, render
from wsekern.atomic_write import atomic_write
from wsekern.error_line import printable

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# What a message may call the reasoning before its answer.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Arguments of transformers' `apply_chat_template` that are no variables of a template.
_NOT_OPTIONS = {
    "conversation",
    "continue_final_message",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_WAITING = 16  # tokens that add no text, before they are taken for no part of a character
_PANIC = "PanicException"  # of Rust, not an Exception; no module has the class


class Codec(Protocol):
    """Text to tokens and back; `FastCodec` wraps a `tokenizers.Tokenizer`."""

    @property
    def size(self) -> int:
        """One more than the highest token."""

    @property
    def definition(self) -> str:
        """A text that is equal for two codecs only if they make the same tokens."""

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text; `special` adds the tokens that begin and end a text."""

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of tokens; `special` writes special tokens by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A checkpoint's tokenizer; `models.load_tokenizer` loads one."""

    codec: Codec
    ends: tuple[int, ...] = ()  # tokens that end a text
    template: str | None = None  # chat template, in Jinja
    templates: dict[str, str] = dataclasses.field(default_factory=dict)  # others, by name
    names: dict[str, Any] = dataclasses.field(default_factory=dict)  # its bos_token, eos_token, ...
    clean_up: bool = False  # whether decoded text loses the spaces before its punctuation
    source: str = ""  # the file it was read from, for error messages

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return self.codec.size

    @property
    def fingerprint(self) -> str:
        """A hash, equal for tokenizers that make the same tokens of every text."""
        return hashlib.sha256(f"{self.codec.definition} {self.ends}".encode()).hexdigest()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of `text`.

        Args:
          text: any; the name of a special token in it becomes that token.
          special: whether to add the tokens that begin and end a text.

        Raises:
          ValueError: `text` is no text, or has half a surrogate pair, which is no character.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is {shown(text)}; it must be a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has {text[error.start]!r} at {error.start}, which is no character"
            ) from None
        return self.codec.encode(text, special)

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of `tokens`; invalid UTF-8 becomes U+FFFD.

        Args:
          tokens: numbers of tokens.
          special: whether special tokens are written by name.

        Raises:
          ValueError: a number is negative, or of more than 32 bits.
        """
        numbers = [int(token) for token in tokens]
        if outside := [number for number in numbers if not 0 <= number < 2**32]:
            raise ValueError(f"token {outside[0]} is no number of a token")
        text = self.codec.decode(numbers, special)
        return _clean(text) if self.clean_up else text

    def chat(
        self,
        /,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **options: Any,
    ) -> list[int]:
        """The tokens of a chat, rendered with the checkpoint's template.

            tokenizer.chat([{"role": "user", "content": "Hi"}], enable_thinking=False)

        A template may come from strangers: what rendering costs is bounded, as
        `models.text.template.render` says.

        Args:
          messages: a dict `{"role": .., "content": ..}` each; fields that are None are left out.
          tools: functions that the model may call, as JSON schemas.
          documents: texts to answer from, a dict each, for templates that know them.
          add_generation_prompt: whether to begin the assistant's answer.
          chat_template: the name of one of `templates`, or a template of your own. By default it is
            "tool_use" if there is one and `tools` are given, or else `self.template`.
          options: further variables of the template.

        Raises:
          ValueError: there is no template, it fails, there are no messages, or an option is none of
            a template's variables.
        """
        rendered = self.chat_text(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **options,
        )
        try:
            return self.encode(rendered, special=False)
        except ValueError as error:
            raise ValueError(f"{self._template_name}: {error}") from None

    def chat_text(
        self,
        /,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **options: Any,
    ) -> str:
        """The text of a chat, whose tokens `chat` gives: it takes the same, and raises the same."""
        if "self" in options:
            raise ValueError("chat has no option 'self': in a template, it means the template")
        if foreign := sorted(_NOT_OPTIONS & options.keys()):
            raise ValueError(
                f"chat has no option {foreign[0]!r}: it returns the tokens of one chat"
            )
        text = self._template(chat_template, tools is not None)
        if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
            raise ValueError(f"messages is {shown(messages)}; it must be a list of messages")
        chat = [_message(plain_data(message, self._template_name)) for message in messages]
        if not chat:
            raise ValueError("messages has none; a chat needs one")
        variables = {
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(text, self.names | options | variables, self.source)

    @property
    def _template_name(self) -> str:
        return f"the chat template of {self.source}" if self.source else "the chat template"

    def _template(self, template: str | None, tools: bool) -> str:
        named = ({} if self.template is None else {"default": self.template}) | self.templates
        if template is not None:
            if not isinstance(template, str):
                raise ValueError(f"chat_template is {shown(template)}; it must be a text")
            return named.get(template, template)
        if tools and "tool_use" in named:
            return named["tool_use"]
        if "default" in named:
            return named["default"]
        where = self.source or "the tokenizer"
        if named:
            raise ValueError(
                f"{where} has no chat template for every use; give chat_template=, one of "
                f"{', '.join(map(repr, named))}"
            )
        raise ValueError(f"{where} has no chat template; use a prompt")

    def check(self, vocab: int) -> None:
        """Raises ValueError if the tokenizer has more tokens than the model's `vocab`."""
        if self.vocab > vocab:
            raise ValueError(
                f"{self.source or 'the tokenizer'} has {self.vocab} tokens, the model knows "
                f"{vocab}: they are not of one checkpoint"
            )

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json; nothing if tokens are bytes.

        If the tokenizer knows the tokens that end a text, it writes generation_config.json too.
        Each file is written whole or not at all. The normalizer of a SentencePiece model is written
        as the one that `tokenizers` has, which loses accents after letters that it replaces: copy
        tokenizer.model where texts may have them.
        """
        if not isinstance(self.codec, FastCodec):
            return
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names}
        settings["clean_up_tokenization_spaces"] = self.clean_up
        named = ({} if self.template is None else {"default": self.template}) | self.templates
        if self.templates:
            settings["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
        elif named:
            settings["chat_template"] = self.template
        texts = {
            "tokenizer.json": self.codec.json,
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
        }
        if self.ends:
            ends = {"eos_token_id": list(self.ends)}
            texts["generation_config.json"] = json.dumps(ends, indent=2)
        for name, text in texts.items():
            with atomic_write(folder / name) as file:
                file.write(text.encode())

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of `tokens` in pieces, one for each token, and one last piece at the end.

        A character is never split: the piece of a token that leaves one incomplete is empty.
        """
        seen: list[int] = []
        done = 0  # tokens of `seen` that are decoded again with the next, but written already
        written = 0  # characters of the text of `seen` that are written
        held = ""  # text that is not cleaned up yet, since what follows may change it
        for token in tokens:
            seen.append(int(token))
            text = self.codec.decode(seen, False)
            waits = text.endswith(_BROKEN) or len(text) <= written
            if waits and len(seen) - done <= _MOST_WAITING:
                yield ""
                continue
            # The last piece is decoded again with the next: some tokenizers put a space before a
            # word only if another word precedes it.
            seen, done = seen[done:], len(seen) - done
            again = self.codec.decode(seen, False)
            # After many tokens that are no character, the newest may begin one still.
            begun = text.endswith(_BROKEN) and again.endswith(_BROKEN)
            held += text[written : len(text) - begun]
            written = len(again) - begun
            clean = _clean_length(held) if self.clean_up else len(held)
            yield _clean(held[:clean]) if self.clean_up else held
            held = held[clean:]
        held += self.codec.decode(seen, False)[written:]
        yield _clean(held) if self.clean_up else held


def _message(message: Any) -> dict[str, Any]:
    """A message as transformers hands it to templates."""
    if not isinstance(message, dict):
        raise ValueError(f"messages holds {shown(message)}; a message is a dict")
    fields = {name: value for name, value in message.items() if value is not None}
    for name in _REASONING:
        if name in fields:  # templates read one of the first two names
            return {"thinking": fields[name]} | fields | {"reasoning_content": fields[name]}
    return fields


def _clean(text: str) -> str:
    """The text without the spaces that stand before its punctuation, as in `transformers`."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip())
    return text


def _clean_length(text: str) -> int:
    """How much of the text is cleaned up alike, whatever follows: up to the last word's spaces."""
    end = len(text)
    while end > 0:
        end = text.rfind(" ", 0, end)
        if end > 0 and text[end - 1] not in " '":
            return end
    return 0


@dataclasses.dataclass(frozen=True)
class FastCodec:
    """A `tokenizers.Tokenizer`.

    `written` is the text of tokenizer.json if `inner` has a normalizer that no file can hold: with
    one that is as near to it as `tokenizers` has.
    """

    inner: Any
    written: str | None = None

    @property
    def size(self) -> int:
        """One more than the highest token."""
        return max(self.inner.get_vocab().values(), default=-1) + 1

    @property
    def definition(self) -> str:
        """A text that is equal for two codecs only if they make the same tokens."""
        text = self.inner.to_str() if self.written is None else f"{self.written}normalized"
        return text + ("split" if self.inner.encode_special_tokens else "")

    @property
    def json(self) -> str:
        """The text of tokenizer.json."""
        return self.inner.to_str(pretty=True) if self.written is None else self.written

    def encode(self, text: str, special: bool) -> list[int]:
        """The tokens of a text; ValueError: the vocabulary lacks a character of it."""
        try:
            return self.inner.encode(text, add_special_tokens=special).ids
        except BaseException as error:
            if type(error).__name__ == _PANIC:  # such as of a pattern that goes on and on
                raise ValueError(
                    f"the tokenizer cannot encode {text[:20]!r}: {printable(str(error))}"
                ) from None
            if type(error) is not Exception:  # `tokenizers` raises bare ones
                raise
            known = self.inner.get_vocab()
            missing = "".join(sorted(set(text) - known.keys()))[:20]
            raise ValueError(
                f"the tokenizer cannot encode {text[:20]!r} ({printable(str(error))}); leave out "
                f"what its vocabulary lacks: {missing!r}"
            ) from None

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of tokens; ValueError: a pattern of the decoder goes on and on."""
        try:
            return self.inner.decode(list(tokens), skip_special_tokens=not special)
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            raise ValueError(f"the tokenizer cannot decode: {printable(str(error))}") from None


@dataclasses.dataclass(frozen=True)
class ByteCodec:
    """One token for each byte of UTF-8, for models without a tokenizer."""

    size: int = 256
    definition: str = "bytes"

    def encode(self, text: str, special: bool) -> list[int]:
        """The bytes of a text."""
        del special
        return list(text.encode())

    def decode(self, tokens: Sequence[int], special: bool) -> str:
        """The text of bytes; tokens above 255 are left out."""
        del special
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")


def bytes_tokenizer() -> Tokenizer:
    """The tokenizer of models without one: one token a byte."""
    return Tokenizer(codec=ByteCodec(), source="bytes")
