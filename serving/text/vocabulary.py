"""The bytes of each token of a tokenizer, and which tokens are markup instead of text."""

import functools
import json
import re
from collections.abc import Sequence

from models.text.bpe import byte_letters
from models.text.tokenizer import ByteCodec, FastCodec, Tokenizer

# Markup that some checkpoints add as tokens which are not special.
_MARKUP = {
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<|python_tag|>"),
}
_TAG = re.compile(r"[<\[]\S+[>\]]")
# A character of no vocabulary, behind which a tokenizer puts no space before a text.
_ANCHOR = "\ue0ff"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class Vocabulary:
    """The tokens of one tokenizer.

    Args:
      tokenizer: any; tokens are read from it when they are asked for.
      templates: chat templates; added tokens that one of them spells are markup.
    """

    def __init__(self, tokenizer: Tokenizer, templates: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        codec = tokenizer.codec
        self._inner = codec.inner if isinstance(codec, FastCodec) else None
        self._known: dict[int, bytes] = {}
        added = {} if self._inner is None else self._inner.get_added_tokens_decoder()
        self.special = frozenset(token for token, one in added.items() if one.special)
        # Tokens that `encode` finds whole in a text, by spelling, if they mean more than the text.
        self.markup: dict[str, int] = {
            one.content: token
            for token, one in added.items()
            if one.content
            and (
                one.special
                or one.content in _MARKUP
                or (
                    # Others are text, such as runs of spaces and tags of HTML.
                    _TAG.fullmatch(one.content) is not None
                    and any(one.content in template for template in templates)
                )
            )
        }
        self._decoder = self._decoder_types()
        self._added = frozenset(added)

    @functools.cached_property
    def size(self) -> int:
        """One more than the highest token."""
        return self.tokenizer.vocab

    @functools.cached_property
    def _anchor(self) -> list[int]:
        try:
            return self.tokenizer.encode(_ANCHOR, special=False)
        except ValueError:  # a tokenizer of few characters
            return []

    @property
    def is_exact(self) -> bool:
        """Whether the text of tokens is always the text of their bytes."""
        if isinstance(self.tokenizer.codec, ByteCodec):
            return True
        return "ByteLevel" in self._decoder and not self.tokenizer.clean_up

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.tokenizer.ends

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are those of its name."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._bytes_of(token)
        return known

    def text_of(self, token: int) -> str:
        r"""A token as it is shown to people: bytes that are no whole characters as `\xe2`."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in content)

    def encode_after(self, text: str) -> list[int]:
        """The tokens of a text that follows another: without the space some put before a text."""
        if not text:
            return []
        anchor = self._anchor
        if anchor:
            both = self.tokenizer.encode(_ANCHOR + text, special=False)
            if both[: len(anchor)] == anchor:
                return both[len(anchor) :]
        return self.tokenizer.encode(text, special=False)

    def _bytes_of(self, token: int) -> bytes:
        if self._inner is None:
            if isinstance(self.tokenizer.codec, ByteCodec):
                return bytes([token]) if 0 <= token < 256 else b""
            return self.tokenizer.codec.decode([token], True).encode()
        name = self._inner.id_to_token(token)
        if name is None:
            return b""
        if token in self._added and "ByteLevel" in self._decoder:
            return self._inner.decode([token], skip_special_tokens=False).encode()
        if "ByteLevel" in self._decoder:
            letters = _letters()
            if all(letter in letters for letter in name):
                return bytes(letters[letter] for letter in name)
            return name.encode()
        if "ByteFallback" in self._decoder and name in _BYTES:
            return bytes([int(name[3:5], 16)])
        if self._decoder & {"Metaspace", "ByteFallback"} or "\u2581" in name:
            return name.replace("\u2581", " ").encode()
        if token in self._added:
            return name.encode()
        return self._inner.decode([token], skip_special_tokens=False).encode()

    def _decoder_types(self) -> frozenset[str]:
        """The kinds of the decoders that write tokens as text, one after the other."""
        if self._inner is None or self._inner.decoder is None:
            return frozenset()
        state = json.loads(self._inner.decoder.__getstate__())
        return frozenset(one["type"] for one in (state, *state.get("decoders", ())))


@functools.cache
def _letters() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_letters())}
