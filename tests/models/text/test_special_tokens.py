"""Special and added tokens of every file that names them; values are those of `transformers`."""

import json
import os
import time

import pytest

pytest.importorskip("tokenizers")

import tokenizers  # noqa: E402
from tokenizers import AddedToken, decoders, pre_tokenizers, processors  # noqa: E402

from models.text import special_tokens  # noqa: E402
from models.text.reading import copy_tokenizer, load_tokenizer  # noqa: E402
from models.text.tokenizer import FastCodec  # noqa: E402

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(*, merges=(), before=()):
    """A tokenizer of bytes; the tokens of `before` come first."""
    vocab = {letter: i for i, letter in enumerate([*LETTERS, *("".join(m) for m in merges)])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(before))
    return inner


def write(folder, inner=None, **files):
    """Writes tokenizer.json and the JSON files named by keyword, such as `tokenizer_config={}`."""
    if inner is not None:
        inner.save(str(folder / "tokenizer.json"))
    for name, fields in files.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def letters(text):
    return [LETTERS.index(letter) for letter in text]


def test_what_training_left_in_a_tokenizer_is_off(tmp_path):
    inner = byte_level(merges=[("a", "b")])
    inner.enable_truncation(4)
    inner.enable_padding(length=20)
    inner.model.dropout = 0.99
    tokenizer = load_tokenizer(write(tmp_path, inner))
    assert [tokenizer.encode("ab" * 9) for _ in range(3)] == [[256] * 9] * 3
    assert tokenizer.names == {"pad_token": "[PAD]"}


@pytest.mark.parametrize("room", [None, 256, 300])
def test_an_end_that_the_vocabulary_lacks_ends_nothing(tmp_path, room):
    config = {} if room is None else {"vocab_size": room}
    write(tmp_path, byte_level(), tokenizer_config={"eos_token": "</s>"}, config=config)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ends == () and tokenizer.names == {"eos_token": "</s>"}
    # As in transformers, it gets the next number, but none that the model has no row for.
    assert tokenizer.encode("</s>") == (letters("</s>") if room == 256 else [256])


@pytest.mark.parametrize("end", ["<e>", {"content": "<e>", "lstrip": False, "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_special_tokens_are_seen_in_either_file(tmp_path, file, end):
    named = {"eos_token": end, "bos_token": None, "additional_special_tokens": ["<x>"]}
    write(tmp_path, byte_level(before=["<e>"]), added_tokens={"<x>": 257}, **{file: named})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ends == (256,) and tokenizer.names == {"eos_token": "<e>"}
    assert tokenizer.encode("a<x><e>") == [*letters("a"), 257, 256]
    assert tokenizer.decode([*letters("a"), 257, 256]) == "a"
    assert tokenizer.decode([257, 256], special=True) == "<x><e>"


def test_special_tokens_map_overrides_a_configuration_without_numbers(tmp_path):
    inner = byte_level(before=["<a>", "<b>"])
    write(tmp_path, inner, special_tokens_map={"eos_token": "<b>"})
    write(tmp_path, tokenizer_config={"eos_token": "<a>"})
    assert load_tokenizer(tmp_path).ends == (257,)
    numbered = {"eos_token": "<a>", "added_tokens_decoder": {"256": {"content": "<a>"}}}
    write(tmp_path, tokenizer_config=numbered)
    assert load_tokenizer(tmp_path).ends == (256,)


FLAGS = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True}


def test_added_tokens_are_found_in_text_as_their_flags_say(tmp_path):
    decoder = {
        "256": {**FLAGS, "content": "<x>"},
        "257": {**FLAGS, "content": "ly", "single_word": True, "lstrip": False, "special": False},
    }
    write(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a <x> b") == [*letters("a"), 256, *letters("b")]
    assert tokenizer.encode("oily ly") == [*letters("oilyĠ"), 257]
    assert tokenizer.decode([256, 257]) == "ly"


def test_many_special_tokens_take_little_time(tmp_path):
    extra = [f"<{i}>" for i in range(5_000)]
    write(tmp_path, byte_level(), tokenizer_config={"additional_special_tokens": extra})
    write(tmp_path, config={"vocab_size": 4_256})
    start = time.process_time()
    tokenizer = load_tokenizer(tmp_path)
    assert time.process_time() - start < 3
    assert tokenizer.vocab == 4_256 and tokenizer.encode("<7><3999>") == [263, 4_255]


def test_tokens_of_a_name_of_their_own_are_special(tmp_path):
    named = {
        "image_token": "<i>",
        "extra_special_tokens": {"audio_token": "<o>"},
        "use_token": True,
    }
    write(tmp_path, byte_level(), tokenizer_config=named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.names == {"image_token": "<i>", "audio_token": "<o>"}
    assert tokenizer.encode("<o><i>") == [257, 256] and tokenizer.decode([256, 257]) == ""


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ({}, {"image_token": "<i>", "sound": "<s>"}),
        ({"eos_token": "<e>"}, {"eos_token": "<e>", "image_token": "<i>", "sound": "<s>"}),
        # These are all that transformers takes, where there are any.
        ({"audio_token": "<o>"}, {"audio_token": "<o>"}),
        ({"extra_special_tokens": {"audio_token": "<o>"}}, {"audio_token": "<o>"}),
        ({"model_specific_special_tokens": None}, {}),
    ],
)
def test_tokens_that_transformers_5_calls_specific_to_a_model(tmp_path, others, names):
    specific = {"image_token": "<i>", "sound": {"__type": "AddedToken", "content": "<s>"}}
    config = {"model_specific_special_tokens": specific} | others
    tokenizer = load_tokenizer(write(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.names == names
    assert tokenizer.encode("".join(names.values())) == [256 + i for i in range(len(names))]


def test_text_of_special_tokens_can_stay_text(tmp_path):
    write(tmp_path, byte_level(before=["<e>"]), tokenizer_config={"split_special_tokens": True})
    assert load_tokenizer(tmp_path).encode("<e>") == letters("<e>")


def pair(folder, **files):
    """vocab.json and merges.txt, and the JSON files named by keyword."""
    vocab = {letter: i for i, letter in enumerate([*LETTERS, "Ġa", "e\u0301"])}
    (folder / "merges.txt").write_text("#version: 0.2\nĠ a\r\n")
    return write(folder, vocab=vocab, **files)


def test_vocab_and_merges_with_added_tokens(tmp_path):
    pair(
        tmp_path,
        added_tokens={"<|endoftext|>": 258, "<think>": 259},
        special_tokens_map={"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
        tokenizer_config={"add_bos_token": True, "add_prefix_space": True},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.ends == (258,)
    assert tokenizer.encode("a<think>") == [258, 256, 259]
    assert tokenizer.decode([258, 256, 259]) == " a<think>"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"tokenizer_class": "Qwen2TokenizerFast"}},
        {"config": {"model_type": "qwen3"}},
    ],
)
def test_qwen2_normalizes_and_takes_digits_apart(tmp_path, files):
    tokenizer = load_tokenizer(pair(tmp_path, **files))
    assert tokenizer.encode("e\u0301 a") == [*letters("Ã©"), 256]
    assert isinstance(tokenizer.codec, FastCodec)
    words = tokenizer.codec.inner.pre_tokenizer.pre_tokenize_str("it 12")
    assert [word for word, _ in words] == ["it", "Ġ", "1", "2"]


@pytest.mark.parametrize(
    ("settings", "tokens", "names"),
    [
        ({}, ["Ġ", "a"], {}),  # tokenizer.json says so
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ["Ġ", "a"], {}),
        ({"tokenizer_class": "GPT2TokenizerFast"}, ["a"], {"bos_token", "eos_token", "unk_token"}),
        (
            {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "unk_token": None},
            ["Ġ", "a"],
            {"bos_token", "eos_token"},
        ),
    ],
)
def test_a_class_brings_its_prefix_and_its_names(tmp_path, settings, tokens, names):
    inner = byte_level(before=["<|endoftext|>"])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = load_tokenizer(write(tmp_path, inner, tokenizer_config=settings))
    assert tokenizer.encode("a") == [LETTERS.index(token) for token in tokens]
    assert tokenizer.names == dict.fromkeys(names, "<|endoftext|>")
    assert tokenizer.ends == ((256,) if names else ())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"\ud800": 256}}, "added_tokens.json: .* must be a number of its own"),
        ({"tokenizer_config": {"eos_token": "a" * 10_001}}, "eos_token is 'aa.*; it must be a tok"),
        ({"tokenizer_config": {"eos_token": "\ud800"}}, "eos_token is .*; it must be a token"),
        ({"added_tokens": {"<x>": 300}}, "'<x>' is to be number 300, but tokenizer.json makes it"),
        ({"added_tokens": {"<x>": "1"}}, "added_tokens.json: <x> is '1'; it must be a number"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token is 3; it must"),
        (
            {"tokenizer_config": {"eos_token": {"content": 3}}},
            "eos_token is .*; it must be a token",
        ),
        (
            {"tokenizer_config": {"eos_token": {"content": "a", "lstrip": 1}}},
            "eos_token.lstrip is 1",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, r"added_tokens_decoder\['x'\]"),
        (
            {"tokenizer_config": {"added_tokens_decoder": [1]}},
            "added_tokens_decoder is .*an object",
        ),
        ({"tokenizer_config": {"additional_special_tokens": 1}}, "additional_special_tokens is 1"),
        (
            {"tokenizer_config": {"model_specific_special_tokens": ["<i>"]}},
            r"model_specific_special_tokens is \['<i>'\]; it must be an object",
        ),
        (
            {"tokenizer_config": {"model_specific_special_tokens": {"image_token": None}}},
            "model_specific_special_tokens.image_token is None; it must be a token",
        ),
        ({"generation_config": {"eos_token_id": ["</s>"]}}, "generation_config.json: eos_token_id"),
        ({"config": {"eos_token_id": True}}, "config.json: eos_token_id is True"),
        ({"tokenizer_config": {"chat_template": [1]}}, "tokenizer_config.json: chat_template is"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, byte_level(), **files))


def test_a_token_that_the_vocabulary_lacks_is_added_to_no_text(tmp_path):
    inner = byte_level()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 999)]
    )
    with pytest.raises(ValueError, match="adds token 999 to every text, and has 256 tokens"):
        load_tokenizer(write(tmp_path, inner))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["vocab.json"], "merges.txt is missing, the other half of vocab.json"),
        (["merges.txt"], "vocab.json is missing, the other half of merges.txt"),
        (["vocab.txt"], "vocab.txt: no vocabulary that is read"),
        (["tekken.json"], "tekken.json: no vocabulary"),
        (["tokenizer_config.json"], "tokenizer_config.json: no vocabulary"),
    ],
)
def test_a_tokenizer_that_is_not_read_does_not_become_bytes(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


NAMES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
]


@pytest.mark.parametrize("name", [*NAMES, "config.json", "generation_config.json"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path, name):
    """As in half a download; it was taken for a file that is not there."""
    write(tmp_path, byte_level())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/nowhere/blob")
    with pytest.raises(ValueError, match=f"{name} is a link to '/nowhere/blob', which is"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_refused(tmp_path, name):
    if name == "tokenizer_config.json":
        write(tmp_path, byte_level())
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS; .* `git lfs pull`"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", special_tokens._SWITCHES)
def test_a_switch_that_is_no_boolean_is_refused(tmp_path, key):
    """The text "false" counted as true."""
    with pytest.raises(ValueError, match=f"{key} is 'false'; it must be true or false"):
        load_tokenizer(write(tmp_path, byte_level(), tokenizer_config={key: "false"}))
    load_tokenizer(write(tmp_path, byte_level(), tokenizer_config={key: None}))


def test_an_end_beyond_the_vocabulary_is_refused(tmp_path):
    write(tmp_path, byte_level())
    (tmp_path / "config.json").write_text('{"vocab_size": 256, "eos_token_id": [3, 70000]}')
    with pytest.raises(ValueError, match=r"json: eos_token_id is \[3, 70000\], .* 256 tokens"):
        load_tokenizer(tmp_path)


def test_halves_of_a_vocabulary_are_checked_line_by_line(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1.5}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na b c\n")
    with pytest.raises(ValueError, match="vocab.json: 'b' is 1.5; it must be its number"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    with pytest.raises(ValueError, match="merges.txt .* line 3 is 'a b c'; it must be two tokens"):
        load_tokenizer(tmp_path)


def test_templates_are_texts_with_names(tmp_path):
    write(
        tmp_path, byte_level(), tokenizer_config={"chat_template": [{"name": ["a"], "template": 5}]}
    )
    with pytest.raises(ValueError, match="chat_template is .*; it must be a text, or a list"):
        load_tokenizer(tmp_path)
    write(tmp_path, tokenizer_config={"chat_template": [{"name": None, "template": "x"}]})
    with pytest.raises(ValueError, match="chat_template is .*; it must be a text, or a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="chat_template.jinja cannot be read: .*0xe9"):
        load_tokenizer(tmp_path)


def test_what_is_no_text_and_no_token_is_refused(tmp_path):
    tokenizer = load_tokenizer(
        write(tmp_path, byte_level(), tokenizer_config={"chat_template": "x"})
    )
    texts: tuple = (5, "text is 5; it must be"), ("a\ud800", "at 1, which is no character")
    for text, message in texts:
        with pytest.raises(ValueError, match=message):
            tokenizer.encode(text)
    for number in (-1, 10**10):
        with pytest.raises(ValueError, match=f"token {number} is no number of a token"):
            tokenizer.decode([number])
    no_messages: tuple = (None, 5, "hello", {"role": "user"})
    for messages in no_messages:
        with pytest.raises(ValueError, match="it must be a list of messages"):
            tokenizer.chat(messages)


def test_files_that_would_not_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is a FIFO, not a regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, byte_level())
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="chat_template.jinja has 1,099,511,627,776 bytes, more"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["GPTNeoXTokenizer", "GPTNeoXTokenizerFast"])
def test_gpt_neox_s_class_decides_and_not_its_file(tmp_path, name):
    inner = byte_level(before=["<|endoftext|>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    settings = {"tokenizer_class": name, "add_prefix_space": True, "add_bos_token": False}
    tokenizer = load_tokenizer(write(tmp_path, inner, tokenizer_config=settings))
    assert tokenizer.encode("a") == [LETTERS.index(letter) for letter in ("Ġ", "a")]
    assert tokenizer.encode("xe\N{COMBINING ACUTE ACCENT}") == tokenizer.encode("xé")
    assert tokenizer.names["unk_token"] == "<|endoftext|>" and tokenizer.ends == (256,)
    assert tokenizer.encode("<|padding|>") == [257]  # as in transformers 5
    settings.pop("add_prefix_space")
    without = load_tokenizer(write(tmp_path, tokenizer_config=settings))
    assert without.encode("a") == [LETTERS.index("a")]
    for switch in ("add_bos_token", "add_eos_token"):  # transformers 4 and 5 differ
        write(tmp_path, tokenizer_config=settings | {switch: True})
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {switch} is true, which"):
            load_tokenizer(tmp_path)


def test_a_class_with_other_rules_is_refused(tmp_path):
    pair(tmp_path, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    with pytest.raises(ValueError, match="tokenizer_class is 'RobertaTokenizer'; of vocab.json"):
        load_tokenizer(tmp_path)


def test_a_model_with_other_rules_is_refused(tmp_path):
    pair(tmp_path, config={"model_type": "roberta"})
    with pytest.raises(ValueError, match="config.json: model_type is 'roberta', and no file names"):
        load_tokenizer(tmp_path)
    pair(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    assert load_tokenizer(tmp_path).encode("a")


@pytest.mark.parametrize(("room", "tokens"), [(None, 1), (300, 1), (256, 13)])
def test_gpt2_s_end_is_added_where_there_is_room(tmp_path, room, tokens):
    pair(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(LETTERS)}))
    (tmp_path / "merges.txt").write_text("")
    write(tmp_path, config={"vocab_size": room})
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("<|endoftext|>")) == tokens
    assert tokenizer.names["bos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("settings", "model_type", "added"),
    [
        ({}, "gpt2", True),
        ({}, "qwen3", True),
        ({"tokenizer_class": "CodeGenTokenizer"}, "llama", True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "gpt2", False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "gpt2", False),
        ({}, "llama", False),
    ],
)
def test_a_class_that_no_file_names_is_the_model_s(tmp_path, settings, model_type, added):
    config = {"model_type": model_type, "vocab_size": 300}
    write(tmp_path, byte_level(), tokenizer_config=settings, config=config)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.encode("<|endoftext|>") == [256]) == added
    assert tokenizer.names.get("eos_token") == ("<|endoftext|>" if added else None)


def test_too_many_added_tokens_are_refused_at_once(tmp_path):
    many = {str(256 + i): {"content": f"<{i}>"} for i in range(200_000)}
    write(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": many})
    start = time.process_time()
    with pytest.raises(ValueError, match="added_tokens_decoder has 200,000 tokens, more than 100,"):
        load_tokenizer(tmp_path)
    assert time.process_time() - start < 4


def test_several_ends(tmp_path):
    write(tmp_path, byte_level(before=["<e>"]), config={"eos_token_id": [1, 2, 1]})
    assert load_tokenizer(tmp_path).ends == (1, 2)
    write(tmp_path, generation_config={"eos_token_id": None})
    assert load_tokenizer(tmp_path).ends == (1, 2)
    write(tmp_path, generation_config={"eos_token_id": -1})
    assert load_tokenizer(tmp_path).ends == ()


def test_a_copy_has_every_file_of_a_tokenizer(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    copy.mkdir()
    inner = byte_level(before=["<e>"])
    inner.add_tokens([AddedToken("<think>")])
    write(source, inner, special_tokens_map={"eos_token": "<e>"}, added_tokens={"<x>": 258})
    pair(source, generation_config={"eos_token_id": [256]})
    (source / "tokenizer.model").write_bytes(b"")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    copy_tokenizer(source, copy)
    files = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    assert {file.relative_to(copy) for file in copy.rglob("*") if file.is_file()} == files
    assert load_tokenizer(copy).fingerprint == load_tokenizer(source).fingerprint
    assert load_tokenizer(copy).templates == {"tool_use": "{{ tools }}"}


def word_pieces():
    vocab = ["[UNK]", "it", "'", "s", ".", "a", "##b", "n't", "is", ",", "!"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: i for i, piece in enumerate(vocab)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return inner


@pytest.mark.parametrize(
    ("text", "clean"),
    [("it ' s a . ab", "it's a. ab"), ("is n't a , !", "isn't a,!"), ("a ' ' ' s", "a'''s")],
)
def test_spaces_before_punctuation_go_in_streams_too(tmp_path, text, clean):
    write(tmp_path, word_pieces(), tokenizer_config={"clean_up_tokenization_spaces": True})
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == clean
    assert "".join(tokenizer.stream(tokens)) == clean
    assert len(list(tokenizer.stream(tokens))) == len(tokens) + 1
