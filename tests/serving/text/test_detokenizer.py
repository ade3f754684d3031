"""The text of tokens, piece by piece."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer
from serving.text.detokenizer import Detokenizer
from serving.text.vocabulary import Vocabulary

TEXT = "naïve café 日本語 \N{GRINNING FACE} the  wafer\n\n"


@pytest.fixture(params=["chatml", "qwen3", "pieces", "bytes"])
def vocabulary(request, vocabulary_of):
    if request.param == "bytes":
        return Vocabulary(bytes_tokenizer())
    return vocabulary_of(request.param)


def pieces_of(vocabulary, tokens, size=1):
    detokenizer = Detokenizer(vocabulary)
    cut = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [*map(detokenizer.feed, cut), detokenizer.finish()]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_pieces_are_the_text_and_split_no_character(vocabulary, size):
    tokens = vocabulary.tokenizer.encode(TEXT, special=False)
    pieces = pieces_of(vocabulary, tokens, size)
    assert "".join(pieces) == TEXT == vocabulary.tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)
    if size == 1:
        assert len(pieces) > 15 and max(map(len, pieces)) < 10  # it is not held to the end


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_give_the_text_that_decode_gives(vocabulary_of, data):
    vocabulary = vocabulary_of("qwen3")
    tokens = data.draw(st.lists(st.integers(0, vocabulary.size + 3), max_size=30))
    size = data.draw(st.integers(1, 5))
    assert "".join(pieces_of(vocabulary, tokens, size)) == vocabulary.tokenizer.decode(tokens)


def test_a_character_that_is_never_completed_comes_out_at_the_end(vocabulary):
    tokens = vocabulary.tokenizer.encode("日", special=False)[:-1]
    if vocabulary.tokenizer.decode(tokens):
        pieces = pieces_of(vocabulary, tokens)
        assert "".join(pieces[:-1]).strip() == "" and "\ufffd" in pieces[-1]


def test_special_tokens_add_nothing(vocabulary_of):
    vocabulary = vocabulary_of("chatml")
    end = vocabulary.markup["<|im_end|>"]
    tokens = vocabulary.tokenizer.encode("the", special=False)
    assert "".join(pieces_of(vocabulary, [end, *tokens, end])) == "the"


@pytest.mark.parametrize("name", ["qwen3", "pieces", "bytes"])
def test_a_token_takes_bounded_work_whatever_comes(vocabulary_of, name, monkeypatch):
    """Bytes that never complete a character, and tokens without text, are no growing burden."""
    vocabulary = Vocabulary(bytes_tokenizer()) if name == "bytes" else vocabulary_of(name)
    longest = 0
    codec = type(vocabulary.tokenizer.codec)
    decode = codec.decode

    def watched(self, tokens, special):
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens, special)

    monkeypatch.setattr(codec, "decode", watched)
    bad = [token for token in range(vocabulary.size) if vocabulary.bytes_of(token) == b"\xe3"]
    special = sorted(vocabulary.special)[:1]
    text = "".join(pieces_of(vocabulary, [*bad * 200, *special * 200]))
    assert set(text) == {"\ufffd"} and len(text) > 150
    assert longest < 100


def test_tokens_as_people_and_clients_see_them(vocabulary_of):
    vocabulary = vocabulary_of("qwen3")
    for token in vocabulary.tokenizer.encode("the café 日", special=False):
        content = vocabulary.bytes_of(token)
        try:
            assert vocabulary.text_of(token) == content.decode()
        except UnicodeDecodeError:
            assert vocabulary.text_of(token) == "".join(f"\\x{byte:02x}" for byte in content)
    assert vocabulary.text_of(vocabulary.markup["<|im_end|>"]) == "<|im_end|>"
    assert vocabulary.text_of(vocabulary.size + 7) == ""


@pytest.mark.parametrize("name", ["qwen3", "pieces", "bytes"])
def test_the_bytes_of_tokens_are_those_of_the_text(vocabulary_of, name):
    vocabulary = Vocabulary(bytes_tokenizer()) if name == "bytes" else vocabulary_of(name)
    tokens = vocabulary.tokenizer.encode(TEXT, special=False)
    written = b"".join(map(vocabulary.bytes_of, tokens)).decode()
    assert written.removeprefix(" " if name == "pieces" else "") == TEXT


def test_markup_is_what_is_special_or_what_the_template_writes(tokenizer_of):
    inner = tokenizers.Tokenizer.from_str(tokenizer_of("chatml").codec.inner.to_str())
    inner.add_tokens([AddedToken(one, special=False) for one in ("\n\n", "<h1>", "<tool>")])
    tokenizer = Tokenizer(codec=FastCodec(inner))
    found = Vocabulary(tokenizer, ["{{ x }}\n\n<tool>"]).markup
    assert set(found) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"}
