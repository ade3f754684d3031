"""Tokenizers from every format, chat templates, and streams of text."""

import base64
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

import tokenizers  # noqa: E402
from tokenizers import decoders, pre_tokenizers, trainers  # noqa: E402

from models.text import bpe  # noqa: E402
from models.text.reading import copy_tokenizer, load_tokenizer  # noqa: E402
from models.text.tokenizer import bytes_tokenizer  # noqa: E402

TEXTS = [
    "the wafer and the fabric",
    "naïve café 日本語 \N{GRINNING FACE} it's 2026",
    "a  b\n\n c\t",
]


def train_tokenizer():
    """A byte-level tokenizer with few merges."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    return inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    inner = train_tokenizer()
    inner.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<|endoftext|>"},
        "eos_token": "<|endoftext|>",
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_tokenizer_json_with_its_chat_template(folder):
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.ends == (0,) and tokenizer.vocab == train_tokenizer().get_vocab_size()
    tokens = tokenizer.chat([{"role": "user", "content": "the fabric"}])
    assert tokenizer.decode(tokens, special=True) == "<|endoftext|>[user]the fabric[assistant]"
    assert tokens[0] == 0  # the name of a special token is that token
    with pytest.raises(ValueError, match=r"has \d+ tokens, the model knows 100"):
        tokenizer.check(100)


def test_a_saved_tokenizer_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(written) == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert load_tokenizer(tmp_path).codec.definition == tokenizer.codec.definition

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    for write in (tokenizer.save, lambda path: copy_tokenizer(folder, path)):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == written


def test_generation_config_says_what_ends_a_text(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer(tmp_path).ends == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(tmp_path).ends == (7, 8)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "so"}])) == "so!"


def test_vocab_and_merges(folder, tmp_path):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("a<|endoftext|>")[-1] == 0


def test_tiktoken_ranks(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    for token in (b"th", b"the", b" the", b"er", b" w"):
        ranks[token] = len(ranks)
    lines = [f"{base64.b64encode(t).decode()} {r}" for t, r in ranks.items()]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab == len(ranks) + 256
    tokens = tokenizer.encode("the water", special=False)
    assert tokens == [ranks[b"the"], ranks[b" w"], *b"at", ranks[b"er"]]
    assert tokenizer.encode("the")[0] == len(ranks)  # <|begin_of_text|>
    assert tokenizer.encode("<|eot_id|>", special=False) == [len(ranks) + 9]


@pytest.mark.parametrize("line", ["YQ==", "YQ== x", "YQ== 1 2", f"YQ== {'9' * 5000}"])
def test_a_line_that_is_no_rank_is_named(tmp_path, line):
    (tmp_path / "tokenizer.model").write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(ValueError, match="tokenizer.model cannot be read: line 2 is b'YQ=="):
        load_tokenizer(tmp_path)


def test_tiktoken_ranks_with_tokens_of_the_files(tmp_path):
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    decoder = {"256": {"content": "<a>"}, "258": {"content": "<c>", "special": True}}
    config = {"added_tokens_decoder": decoder, "bos_token": "<c>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<a><c><|reserved_token_257|>a") == [256, 258, 257, 97]
    far = {"added_tokens_decoder": {"999999999": {"content": "<a>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(far))
    with pytest.raises(ValueError, match="added token 999999999 is 999,999,744 beyond its 256"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="its 255 tokens are not numbered from 0 to 254"):
        load_tokenizer(tmp_path)


def test_sentencepiece(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 20))
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in [*TEXTS, "wafers the\N{SNOWMAN}"]:
        assert ours.encode(text, special=False) == theirs.encode(text)
        assert ours.encode(text)[0] == theirs.bos_id()
        assert ours.decode(ours.encode(text)) == text
    assert ours.ends == (theirs.eos_id(),)


@given(st.text(max_size=12))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_stream_never_splits_a_character(text):
    tokenizer = bytes_tokenizer()
    pieces = list(tokenizer.stream(tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert all(piece in text and "\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) or (
        "\N{REPLACEMENT CHARACTER}" in text
    )


def test_a_stream_that_ends_within_a_character_says_so():
    tokens = "é".encode()[:1]
    assert "".join(bytes_tokenizer().stream(tokens)) == "\N{REPLACEMENT CHARACTER}"


def test_without_a_tokenizer_tokens_are_bytes(tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("é") == [0xC3, 0xA9] and tokenizer.vocab == 256
    with pytest.raises(ValueError, match="bytes has no chat template"):
        tokenizer.chat([])


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


def test_an_unknown_cut_is_refused():
    with pytest.raises(ValueError, match="pre-tokenizer 'other' is not one of"):
        bpe.byte_level({"a": 0}, [], cut="other")
