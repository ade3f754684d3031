"""SentencePiece models without a tokenizer.json, held against the library itself."""

import json
import math
import struct

import pytest

pytest.importorskip("tokenizers")
spm = pytest.importorskip("sentencepiece")

from models.text.bpe import merges_of_ranks  # noqa: E402
from models.text.reading import load_tokenizer  # noqa: E402
from models.text.sentencepiece_model import read_model  # noqa: E402
from models.text.tokenizer import FastCodec  # noqa: E402

CORPUS = ["the wafer and the fabric", "naïve café 日本語", "it's 2026, tokens and words"] * 20
TEXTS = [
    "the wafer and the fabric",
    "  naïve   café \N{LATIN SMALL LIGATURE FI} \N{FULLWIDTH LATIN CAPITAL LETTER A} ",
    "a  b\n\n c\t▁ the",
    "日本 \N{SNOWMAN} wafers<x>the <x>",
    "",
    " ",
]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a model once for each set of options; returns its bytes."""
    models = {}

    def model(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in models:
            folder = tmp_path_factory.mktemp("spm")
            (folder / "corpus.txt").write_text("\n".join(CORPUS))
            spm.SentencePieceTrainer.train(
                input=str(folder / "corpus.txt"),
                model_prefix=str(folder / "m"),
                vocab_size=330 if options.get("byte_fallback") else 70,
                hard_vocab_limit=False,
                minloglevel=9,
                **options,
            )
            models[key] = (folder / "m.model").read_bytes()
        return models[key]

    return model


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False, "byte_fallback": True},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True, "bos_id": -1},
        {"user_defined_symbols": ["<x>", "wafer"], "control_symbols": ["<|end|>"], "eos_id": -1},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_library(train, tmp_path, model_type, options):
    content = train(model_type=model_type, **options)
    (tmp_path / "tokenizer.model").write_bytes(content)
    theirs = spm.SentencePieceProcessor(model_proto=content)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        tokens = ours.encode(text, special=False)
        assert tokens == theirs.encode(text), text
        if theirs.unk_id() not in tokens:
            assert ours.decode(tokens) == theirs.decode(tokens), text
        assert "".join(ours.stream(tokens)) == ours.decode(tokens)
    begin = [theirs.bos_id()] if theirs.bos_id() >= 0 else []
    assert ours.encode("the") == begin + theirs.encode("the")
    assert ours.ends == ((theirs.eos_id(),) if theirs.eos_id() >= 0 else ())


LETTERS = [
    "a\r\nb\r\n\r\nc \t\t d",
    "\N{LATIN SMALL LIGATURE FI}\N{COMBINING ACUTE ACCENT}x",
    "\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{COMBINING CIRCUMFLEX ACCENT}",
    "a\N{COMBINING DIAERESIS}\N{COMBINING ACUTE ACCENT}",
    "\N{CIRCLED DIGIT ONE}\N{COMBINING ACUTE ACCENT}",
    "\N{VULGAR FRACTION ONE HALF}\N{COMBINING ENCLOSING KEYCAP}",
    "\N{HALFWIDTH KATAKANA LETTER KA}\N{HALFWIDTH KATAKANA VOICED SOUND MARK}",
    "\u1100\u1161\u11a8 \u1100\u1161 \uac00\u11a8",
    "\N{TRADE MARK SIGN}\ufe0f \ufdfa \u200bx \ufeffx \u00a0",
    "A<X>a<x>\N{LATIN SMALL LIGATURE FI}<X>",
]


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf"])
def test_letters_are_normalized_as_the_library_does(train, tmp_path, rule):
    options = {"normalization_rule_name": rule, "byte_fallback": True}
    content = train(model_type="bpe", user_defined_symbols=["<X>"], **options)
    (tmp_path / "tokenizer.model").write_bytes(content)
    theirs = spm.SentencePieceProcessor(model_proto=content)
    size = theirs.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<\N{CIRCLED DIGIT ONE}>": size}))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*LETTERS, " ".join(LETTERS)]:
        tokens = tokenizer.encode(text, special=False)
        assert tokens == theirs.encode(text), ascii(text)
        assert tokenizer.decode(tokens) == theirs.decode(tokens), ascii(text)
    assert size in tokenizer.encode("x<\N{CIRCLED DIGIT ONE}>")
    # A saved tokenizer has the nearest that tokenizer.json can say; it makes other tokens.
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.encode("the fabric") == tokenizer.encode("the fabric")
    assert saved.fingerprint != tokenizer.fingerprint
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("legacy", "after"), [(None, "▁the"), (True, "▁the"), (False, "the")])
def test_legacy_says_whether_a_space_follows_a_special_token(train, tmp_path, legacy, after):
    content = train(model_type="bpe", byte_fallback=True, user_defined_symbols=["the"])
    (tmp_path / "tokenizer.model").write_bytes(content)
    settings = {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode("</s>the", special=False)
    assert isinstance(tokenizer.codec, FastCodec)
    pieces = [tokenizer.codec.inner.id_to_token(token) for token in tokens]
    assert pieces[-1] == "the" and "".join(pieces) == "</s>" + after


def test_added_tokens_and_what_begins_and_ends_a_text(train, tmp_path):
    content = train(model_type="bpe", byte_fallback=True)
    size = spm.SentencePieceProcessor(model_proto=content).get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": size, "[PAD]": size + 1}))
    settings = {"add_bos_token": False, "add_eos_token": True, "pad_token": "[PAD]"}
    settings |= {"bos_token": "a b:7"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<think>[PAD]") == [size, size + 1, 2]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    assert load_tokenizer(tmp_path).encode("<think>") == [size + 2, size, 2]
    assert tokenizer.decode([size, size + 1]) == "<think>"
    # A number of the model's own is another name for its piece.
    decoder = {"3": {"content": "<|user|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert load_tokenizer(tmp_path).encode("<|user|>") == [1, 3]


def test_the_configuration_can_take_the_prefix_away(train, tmp_path):
    content = train(model_type="bpe", byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode("the the", special=False)
    assert isinstance(tokenizer.codec, FastCodec)
    pieces = [tokenizer.codec.inner.id_to_token(token) for token in tokens]
    assert "".join(pieces) == "the▁the" and tokenizer.decode(tokens) == "the the"


def message(*fields):
    """A protocol buffer's bytes of (number, bytes or integer) below 128."""
    parts = [
        bytes([number << 3 | 2, len(value)]) + value
        if isinstance(value, bytes)
        else bytes([number << 3, value])
        for number, value in fields
    ]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([message((1, b"a")), message((1, b"a"))], "piece 'a' is empty or there twice"),
        ([message((1, b""))], "piece '' is empty or there twice"),
        ([message((1, b"a"), (3, 9))], "is not a SentencePiece model"),
        ([message((1, b"\xff"))], "is not a SentencePiece model"),
        ([message((1, b"a")) + b"\x15" + struct.pack("<f", math.nan)], "score that is not finite"),
        ([message((1, b"a")), b"\x0e"], "is not a SentencePiece model"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(tmp_path, pieces, reason):
    (tmp_path / "tokenizer.model").write_bytes(message(*((1, piece) for piece in pieces)))
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(tmp_path)


def test_a_piece_that_would_take_minutes_is_refused(tmp_path):
    text = b"a" * 1_000_000
    piece = b"\x0a\xc0\x84\x3d" + text  # 1,000,000 as a number of three bytes
    others = [(1, message((1, letter))) for letter in (b"b", b"c")]
    content = b"\x0a\xc4\x84\x3d" + piece + message(*others, (2, message((3, 2))))
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model: piece 'aa.* has 1,000,000 characters"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="1 tokens of up to 1,000,000 bytes split into too many"):
        merges_of_ranks({text: 0})


def test_what_is_no_model_is_refused(train, tmp_path):
    file = tmp_path / "tokenizer.model"
    content = train(model_type="bpe")
    for damaged in (b"", b"\xff" * 40, content[:-3], b"\x0a\x02\x0a\xff", content + b"\x0a\x80"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model"):
            load_tokenizer(tmp_path)
    words = b"\x12\x02\x18\x03"  # trainer_spec { model_type: WORD }
    file.write_bytes(content + words)
    with pytest.raises(ValueError, match="model_type 3 is neither unigram"):
        load_tokenizer(tmp_path)
    file.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"sp_model_kwargs": {"nbest_size": -1}}')
    with pytest.raises(ValueError, match="sp_model_kwargs is {'nbest_size': -1}; only an empty"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(
        ValueError, match="tokenizer_class is 'XLMRobertaTokenizer'; of tokenizer.m"
    ):
        load_tokenizer(tmp_path)


def test_the_fields_of_a_model(train, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram"))
    model = read_model(tmp_path / "tokenizer.model")
    assert model.pieces[:3] == ("<unk>", "<s>", "</s>") and model.unigram
    assert struct.pack("<f", model.scores[3]) and model.scores[3] < 0
    assert (model.unknown, model.begin, model.end) == (0, 1, 2)
