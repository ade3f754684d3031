"""What a tokenizer.json may make of a text is bounded, before it is given any."""

import base64
import json
import time

import pytest

pytest.importorskip("tokenizers")

import tokenizers  # noqa: E402
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors  # noqa: E402

from models.text.reading import load_tokenizer  # noqa: E402

Replace = normalizers.Replace
HARMLESS = [
    # Of CLIP, Llama 2, ALBERT, and of one who cleans up punctuation.
    normalizers.Sequence([normalizers.NFC(), Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
    normalizers.Sequence([normalizers.Prepend("▁"), Replace(" ", "▁")]),
    normalizers.Sequence([Replace("``", '"'), normalizers.NFKD(), normalizers.Lowercase()]),
    normalizers.Sequence([Replace(*pair) for pair in zip("…«»„“", ["..."] * 5, strict=True)] * 9),
    normalizers.Sequence([Replace(Regex(r"\s+"), " ")] * 50),
]
BOMBS = {
    "1,000,000,000 times": normalizers.Sequence([Replace("a", "a" * 10)] * 9),
    "1,000,000 times": normalizers.Sequence([Replace("a", "b" * 10), Replace("b", "a" * 10)] * 3),
    "times as long": normalizers.Sequence([Replace(Regex("x?"), "aa")] * 11),
    "5,832 times": normalizers.Sequence([normalizers.NFKC()] * 3),
    "20,000 to any text": normalizers.Prepend("x" * 20_000),
    "1,000 steps|2,000 steps": normalizers.Sequence([normalizers.Strip()] * 2000),
}


def save(folder, **parts):
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]
        )
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(inner, name, part)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("normalizer", HARMLESS)
def test_what_models_have_is_read(tmp_path, normalizer):
    assert load_tokenizer(save(tmp_path, normalizer=normalizer)).encode("a  b…")


@pytest.mark.parametrize("message", BOMBS)
def test_normalizers_that_grow_are_refused(tmp_path, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"tokenizer.json: its normalizer .*({message})"):
        load_tokenizer(save(tmp_path, normalizer=BOMBS[message]))
    assert time.process_time() - start < 4


def test_decoders_and_frames_that_grow_are_refused(tmp_path):
    twice = decoders.Sequence([decoders.Replace("a", "aa")] * 20)
    with pytest.raises(ValueError, match="its decoder may make a text 1,048,576 times"):
        load_tokenizer(save(tmp_path, decoder=twice))
    frame = processors.TemplateProcessing(single="$A $A", special_tokens=[])
    with pytest.raises(ValueError, match="its post_processor may make a text 4,096 times"):
        load_tokenizer(save(tmp_path, post_processor=processors.Sequence([frame] * 12)))
    frame = processors.TemplateProcessing(single=["a", "$A"], special_tokens=[("a", 1)])
    save(tmp_path, post_processor=frame)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["post_processor"]["single"] *= 20_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="its post_processor may"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("letter", ["a", '"', "\\", "é"])
def test_a_piece_of_a_million_letters_is_refused_before_it_is_read(tmp_path, letter):
    vocab = [["<unk>", 0.0], [letter * 1_000_000, -1.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(ValueError, match="the token .* has 1,000,000 characters, more"):
        load_tokenizer(tmp_path)


def test_a_pattern_of_many_classes_is_refused_before_it_is_read(tmp_path):
    save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = {"Regex": r"\p{L}" * 50_000}
    fields["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="the pattern .* has 250,000 characters, more than 10,000"):
        load_tokenizer(tmp_path)


def test_a_long_table_of_normalization_is_no_token(tmp_path):
    table = base64.b64encode(bytes(30_000)).decode()
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    normalizer = {"type": "Replace", "pattern": {"String": table}, "content": ""}
    fields = {"version": "1.0", "normalizer": normalizer, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert load_tokenizer(tmp_path).encode("a") == [1]


def test_a_frame_must_define_its_tokens(tmp_path):
    frame = processors.TemplateProcessing(single=["a", "$A"], special_tokens=[("a", 1)])
    save(tmp_path, post_processor=frame)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="its post_processor names 'a', which it does not define"):
        load_tokenizer(tmp_path)


def test_a_number_far_beyond_the_others_is_refused_at_once(tmp_path):
    save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["model"]["vocab"]["xyz"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    start = time.process_time()
    with pytest.raises(ValueError, match="tokenizer.json numbers a token 2,147,483,648; at most"):
        load_tokenizer(tmp_path)
    assert time.process_time() - start < 4


def test_a_pattern_that_goes_on_and_on_is_an_error_of_the_text(tmp_path):
    words = pre_tokenizers.Split(Regex("(a|a)*c|b"), "isolated")
    tokenizer = load_tokenizer(save(tmp_path, pre_tokenizer=words))
    with pytest.raises(ValueError, match="cannot encode 'aaaa.*retry-limit-in-match over"):
        tokenizer.encode("a" * 100 + "!c")
