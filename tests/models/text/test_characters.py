"""Tokenizers whose tokens are characters: as a corpus of characters counts them, and back."""

import json

import pytest

from models.text.characters import save_characters
from models.text.reading import load_tokenizer

# Line ends, characters of two to four bytes, a combining one, one that joins, and what looks
# special to other tokenizers.
ALPHABET = "".join(sorted(set("\n\r\t abc,.<|>\x01\x85\u0301\u200d\u2028\ufeffé日😀")))


def test_every_character_is_one_token_and_comes_back(tmp_path):
    save_characters(ALPHABET, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = ALPHABET * 2 + "\r\n\r\n  a ."
    tokens = tokenizer.encode(text)
    assert tokens == [ALPHABET.index(character) for character in text]
    assert tokenizer.decode(tokens) == "".join(tokenizer.stream(tokens)) == text
    assert (tokenizer.vocab, tokenizer.ends) == (len(ALPHABET), ())
    # transformers must neither strip spaces before a full stop nor add a token.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["clean_up_tokenization_spaces"] is False


def test_another_character_is_refused_by_name(tmp_path):
    save_characters("abc", tmp_path)
    with pytest.raises(ValueError, match="cannot encode 'axb'.*vocabulary lacks: 'x'"):
        load_tokenizer(tmp_path).encode("axb")
