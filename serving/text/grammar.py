"""Grammars that hold an answer to a JSON schema, a regular expression or a tool's arguments.

`llguidance` reads them, and says at each step which tokens may come next:
https://github.com/guidance-ai/llguidance.
"""

import collections
import re
import threading
from typing import Any

import numpy as np

from serving.text.schemas import json_rule
from serving.text.vocabulary import Vocabulary
from wsekern.error_line import printable

MOST_REGEX = 8_192  # characters
MOST_LARK = 65_536  # characters
_MOST_ERROR = 300  # characters of an error message
_MOST_ITEMS = 10_000  # of the parser, at one place of a text; an optional property takes four
_PLACE = re.compile(r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?")
_CACHED = 32  # grammars kept


class GrammarMatcher:
    """A grammar and the place in it that one answer has reached; a `serving.request.Matcher`."""

    def __init__(self, inner: Any, ends: frozenset[int], vocab: int) -> None:
        self._inner = inner
        self._ends = ends
        self._vocab = vocab
        self._ended = 0  # tokens accepted after the text's end

    def fill_mask(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next; see `serving.request.Matcher`.

        Tokens that end a text may come where the text may end, and special tokens nowhere else.

        Raises:
          ValueError: the grammar takes more work than is allowed.
        """
        mask[:] = 0
        if self._ended:
            for end in self._ends:
                mask.view(np.uint32)[end // 32] |= np.uint32(1 << end % 32)
            return
        self._check()
        found = np.frombuffer(self._inner.compute_bitmask(), np.int32)
        self._check()
        words = min(len(found), len(mask), -(-self._vocab // 32))
        mask[:words] = found[:words]
        if self._vocab % 32 and words == -(-self._vocab // 32):
            mask.view(np.uint32)[words - 1] &= np.uint32((1 << self._vocab % 32) - 1)

    def accept(self, token: int) -> bool:
        """Moves on by one token; False, without a move, if the grammar does not allow it.

        Raises:
          ValueError: the grammar takes more work than is allowed; the answer cannot go on.
        """
        if token in self._ends:
            if not self._ended and not self._inner.is_accepting():
                return False
            self._ended += 1
            return True
        if self._ended or not 0 <= token < self._vocab:
            return False
        accepted = self._inner.try_consume_tokens([token]) == 1
        self._check()
        return bool(accepted)

    def rollback(self, tokens: int) -> None:
        """Takes the newest `tokens` back."""
        after_end = min(tokens, self._ended)
        self._ended -= after_end
        if tokens > after_end and not self._inner.rollback(tokens - after_end):
            raise ValueError(f"no {tokens} tokens can be taken back from the grammar")

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is only one way to go on.

        A mask would allow each of them alone, in turn: they are a draft that is never wrong.
        """
        return [] if self._ended else list(self._inner.compute_ff_tokens())

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text may come next."""
        if self._ended:
            return True
        return bool(self._inner.is_stopped() and not self._inner.is_error())

    def _check(self) -> None:
        if self._inner.is_error():
            raise ValueError(f"the grammar fails: {_shortened(self._inner.get_error())}")


class Grammar:
    """A compiled grammar; `matcher` begins a new text."""

    def __init__(self, inner: Any, ends: frozenset[int], vocab: int) -> None:
        self._inner = inner
        self._ends = ends
        self._vocab = vocab

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning of a text; each answer needs one of its own."""
        return GrammarMatcher(self._inner.deep_copy(), self._ends, self._vocab)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the newest. Any thread may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._grammars: collections.OrderedDict[str, Grammar] = collections.OrderedDict()

    def compile(self, lark: str) -> Grammar:
        """The grammar that is written in llguidance's dialect of Lark.

        Work is bounded, by llguidance's own limits, to some tenths of a second.

        Raises:
          ValueError: llguidance is not installed, or it refuses the grammar; with its reason.
        """
        with self._lock:
            if lark in self._grammars:
                self._grammars.move_to_end(lark)
                return self._grammars[lark]
            tokenizer = self._tokenizer = self._tokenizer or _read_tokens(self._vocabulary)
        ends = frozenset(self._vocabulary.ends)
        grammar = Grammar(_compile(tokenizer, lark), ends, self._vocabulary.size)
        with self._lock:
            self._grammars[lark] = grammar
            if len(self._grammars) > _CACHED:
                self._grammars.popitem(last=False)
        return grammar

    def check_schema(self, schema: Any, field: str) -> str:
        """A JSON schema as Lark takes it, `%json {..}`.

        Args:
          schema: an object.
          field: where the request has it, for error messages.

        Raises:
          ValueError: it is none, too long, too deep, or uses what llguidance does not know.
        """
        lark = json_rule(schema, field)
        try:
            self.compile(f"start: {lark}")
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        return lark


def regex_rule(regex: str, field: str) -> str:
    """`/../` for Lark, of a regular expression; ValueError: it is too long."""
    if len(regex) > MOST_REGEX:
        raise ValueError(f"{field} has {len(regex):,} characters; {MOST_REGEX:,} is the most")
    return f"/{_llguidance().regex_to_lark(regex, '')}/"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "grammars need llguidance; run `pip install -e '.[serve]' -c constraints.txt`"
        ) from None
    return llguidance


def _compile(tokenizer: Any, lark: str) -> Any:
    """An `LLMatcher` at the beginning of a text."""
    llguidance = _llguidance()
    # Limits of work are llguidance's own: a step of the lexer, for example, takes at most 15 ms.
    limits = llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=_MOST_ITEMS)
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first one shows what is beyond the limits
    if matcher.is_error():
        error = matcher.get_error()
        # Where nothing at all may come first, llguidance gives this for the reason.
        raise ValueError("no text matches it" if "NoExtension" in error else _shortened(error))
    return matcher


def _shortened(error: str) -> str:
    """What an error of llguidance says, in one line, without its place in a grammar of ours."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines:
        return "no reason is given"
    detail = f" {lines[-1]}" if lines[-1].startswith("error:") else ""
    text = _PLACE.sub("", lines[0]) + detail
    return printable(text)[:_MOST_ERROR]


def _read_tokens(vocabulary: Vocabulary) -> Any:
    """An `LLTokenizer` of a vocabulary; takes some tenths of a second."""
    llguidance = _llguidance()
    tokens = _Tokens(vocabulary)
    ends = [*vocabulary.ends] or [vocabulary.size]
    tokens.inner = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=ends)
    return tokens.inner


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.inner: Any = None  # the LLTokenizer that is made of this
        self.tokens = [vocabulary.bytes_of(token) for token in range(vocabulary.size)]
        # Markup that is not special is no text either: no grammar may write it as such.
        special = vocabulary.special | set(vocabulary.markup.values()) | set(vocabulary.ends)
        if not vocabulary.ends:  # it needs one; no mask shows it, for it is beyond the vocabulary
            self.tokens.append(b"<end>")
            special |= {vocabulary.size}
        self.special_token_ids = sorted(special)
        self.eos_token_id = vocabulary.ends[0] if vocabulary.ends else vocabulary.size

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of text that a grammar forces; their bytes must be those of the text."""
        known = self._vocabulary
        try:
            tokens = known.encode_after(text.decode())
        except ValueError:  # half a character, or one that the vocabulary lacks
            tokens = []
        written = b"".join(map(known.bytes_of, tokens))
        if self.inner is None:  # it is being made, and tries what this takes
            return tokens
        if written != text or not set(tokens).isdisjoint(self.special_token_ids):
            return list(self.inner.greedy_tokenize(text.decode(errors="replace")))
        return tokens
