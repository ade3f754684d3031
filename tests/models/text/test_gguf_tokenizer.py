"""Tokenizers of GGUF files; `llama.cpp` gave the right values of those that name nothing."""

import time

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from models.text import gguf_tokenizer  # noqa: E402
from models.text.bpe import byte_letters  # noqa: E402
from models.text.pretokenizers import PRE_TOKENIZERS  # noqa: E402
from models.text.reading import load_tokenizer  # noqa: E402

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def write(file, kind, tokens, types, **fields):
    """Writes a GGUF file that holds a tokenizer alone."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name.replace('normalizer_', 'normalizer.')}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def byte_level(file, special=(), **fields):
    """A tokenizer of bytes and "ab", with `special` tokens of (name, type) from number 257 on."""
    tokens = [*byte_letters(), "ab", *(name for name, _ in special)]
    types = [NORMAL] * 257 + [kind for _, kind in special]
    return write(file, "gpt2", tokens, types, **{"merges": ["a b"], "pre": "llama-bpe"} | fields)


def pieces(file, special=(), **fields):
    """A SentencePiece tokenizer of "▁ab" and its parts, with `special` from number 263 on."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁a", "▁ab", "▁", "a", "b", *(name for name, _ in special)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0] + [-1000.0] * len(special)
    types += [kind for _, kind in special]
    return write(file, "llama", tokens, types, **{"scores": scores} | fields)


LLAMA_3 = (("<|begin_of_text|>", CONTROL), ("<|eot_id|>", CONTROL), ("<think>", USER_DEFINED))


def test_user_defined_tokens_are_whole_and_stay_in_the_text(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", LLAMA_3, bos_token_id=257))
    assert tokenizer.encode("ab<think>ab") == [257, 256, 259, 256]
    assert tokenizer.decode([257, 256, 259, 258]) == "ab<think>"
    special = [("<café>", USER_DEFINED), ("｜日｜", USER_DEFINED), ("<ß>", CONTROL)]
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", special, pre="qwen2"))
    tokens = tokenizer.encode("é<café>｜日｜<ß>")
    assert tokens[-3:] == [257, 258, 259]
    assert tokenizer.decode(tokens) == "é<café>｜日｜"
    assert tokenizer.decode(tokens, special=True) == "é<café>｜日｜<ß>"
    tokenizer = load_tokenizer(pieces(tmp_path / "b.gguf", [("  <think>", USER_DEFINED)]))
    assert tokenizer.encode("ab  <think>ab") == [1, 260, 264, 260]
    assert tokenizer.encode("<unk></s>") == [1, 0, 2]


@pytest.mark.parametrize(
    ("pre", "begins"),
    [("llama-bpe", True), ("llama-v3", True), ("falcon3", True), ("tekken", True)]
    + [("smaug-bpe", False), ("qwen2", False), ("gpt-2", False), ("default", False)],
)
def test_texts_begin_with_a_token_where_the_file_or_the_pre_tokenizer_says_so(
    pre, begins, tmp_path
):
    fields = {"pre": pre, "bos_token_id": 257, "eos_token_id": 258}
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", LLAMA_3, **fields))
    assert tokenizer.encode("ab") == [257] * begins + [256]
    for begin in (True, False):
        more = {"add_bos_token": begin, "add_eos_token": True}
        tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", LLAMA_3, **fields, **more))
        assert tokenizer.encode("ab") == [257] * begin + [256, 258]
        assert tokenizer.encode("ab", special=False) == [256]


def test_a_text_begins_with_nothing_where_there_is_no_such_token(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", LLAMA_3, pre="falcon3"))
    assert tokenizer.encode("ab") == [256]


def test_the_token_that_begins_a_text_may_be_spelled_with_a_colon(tmp_path):
    special = [("<|a:bos|>", CONTROL), ("<b:0>", CONTROL)]
    fields = {"bos_token_id": 257, "eos_token_id": 258, "add_eos_token": True}
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", special, **fields))
    assert tokenizer.encode("ab") == [257, 256, 258]


@pytest.mark.parametrize(
    ("special", "fields", "ends"),
    [
        ([("<|im_end|>", CONTROL), ("<|endoftext|>", CONTROL)], {}, {257, 258}),
        ([("<|im_end|>", NORMAL)], {}, {257}),
        ([("<end_of_turn>", USER_DEFINED), ("<x>", CONTROL)], {"eos_token_id": 258}, {257, 258}),
        (
            [("<x>", CONTROL), ("<y>", CONTROL)],
            {"eot_token_id": 257, "eom_token_id": 258},
            {257, 258},
        ),
        ([("<|return|>", CONTROL), ("<|call|>", CONTROL), ("<|end|>", CONTROL)], {}, {257, 258}),
        ([("<|end|>", CONTROL), ("<|start|>", CONTROL)], {}, {257}),
        ([("</s>", NORMAL), ("<eos>", CONTROL)], {}, {258}),
        ([("<|file_sep|>", CONTROL), ("<|fim_pad|>", CONTROL)], {}, {257, 258}),
    ],
)
def test_tokens_that_end_a_text_are_known_by_name(special, fields, ends, tmp_path):
    fields = {"pre": "qwen2"} | fields
    tokenizer = load_tokenizer(byte_level(tmp_path / "a.gguf", special, **fields))
    assert set(tokenizer.ends) == ends
    for i, (name, _) in enumerate(special):
        if 257 + i in ends:
            assert tokenizer.encode(f"ab{name}", special=False) == [256, 257 + i]


def test_sentencepiece_has_its_usual_numbers_where_the_file_has_none(tmp_path):
    tokenizer = load_tokenizer(pieces(tmp_path / "a.gguf"))
    assert tokenizer.encode("ab é") == [1, 260, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.ends == (2,) and tokenizer.decode([1, 260, 2]) == "ab"
    assert tokenizer.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = load_tokenizer(pieces(tmp_path / "a.gguf", add_space_prefix=False))
    assert tokenizer.encode("ab") == [1, 262, 263]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 123's\n\n x", ["a", " 123", "'s", "\n\n", " x"]),
        ("default", "a 123's\n\n x", ["a", " ", "123", "'", "s", "\n\n", " x"]),
        ("llama-bpe", "a 1234's\n\n x", ["a", " ", "123", "4", "'s", "\n\n", " x"]),
        ("qwen2", "a 12'S.\n x", ["a", " ", "1", "2", "'S", ".\n", " x"]),
        ("smollm", "a 12's\n\n x", ["a", " ", "1", "2", "'s", "\n\n", " x"]),
        ("gpt-4o", "aBC's 12/\n", ["a", "BC's", " ", "12", "/\n"]),
        ("tekken", "aBC's 12/\n", ["a", "BC", "'s", " ", "1", "2", "/\n"]),
        ("falcon", "a..b 1234", ["a", "..", "b", " ", "123", "4"]),
        ("deepseek-coder", "if x1:\n", ["if", " x", "1", ":", "\n"]),
        ("deepseek-llm", "é x12:\n", ["é", " x", "12", ":", "\n"]),
        ("deepseek-v3", "a 1234 _b", ["a", " ", "123", "4", " _", "b"]),
    ],
)
def test_words_are_split_as_the_name_says(pre, text, words):
    letters = byte_letters()
    found = [word for word, _ in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]
    assert found == ["".join(letters[byte] for byte in word.encode()) for word in words]


def test_aliases_mean_the_same():
    for one, other in [("llama3", "pixtral"), ("qwen2", "deepseek-r1-qwen"), ("gpt-2", "phi-2")]:
        assert PRE_TOKENIZERS[one] == PRE_TOKENIZERS[other]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "gemma4"}, "tokenizer.ggml.pre='gemma4' is not one of"),
        ({"merges": ["a b", "ab"]}, r"tokenizer.ggml.merges\[1\]='ab' is no pair"),
        ({"merges": ["a q?"]}, "merges do not fit its tokens"),
        ({"eos_token_id": 999}, "eos_token_id=999 is not a whole number from 0 to 259"),
        ({"eos_token_id": "2"}, "eos_token_id='2' is not a whole number"),
        ({"add_bos_token": True}, "have no tokenizer.ggml.bos_token_id"),
        ({"add_sep_token": True}, "add_sep_token=True is not supported"),
        ({"normalizer_lowercase": True}, "lowercase=True is not supported"),
        ({"suppress_tokens": [1, 2]}, r"suppress_tokens=\[1, 2\] is not supported"),
        ({"a_new_key": 1}, "tokenizer.ggml.a_new_key=1 is not known here"),
    ],
)
def test_refuses_what_would_change_tokens(fields, message, tmp_path):
    fields = {"pre": "gpt-2"} | fields
    with pytest.raises(ValueError, match=rf"a\.gguf.*{message}"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", LLAMA_3, **fields))


def test_refuses_lists_that_do_not_fit(tmp_path):
    for kind in ("bert", "t5", "rwkv"):
        with pytest.raises(ValueError, match=f"tokenizer.ggml.model='{kind}' is no kind"):
            load_tokenizer(write(tmp_path / "a.gguf", kind, ["a"], [NORMAL]))
    with pytest.raises(ValueError, match="tokens has 'a' twice, as 0 and 2"):
        load_tokenizer(
            write(tmp_path / "a.gguf", "gpt2", ["a", "b", "a"], [NORMAL] * 3, merges=[""])
        )
    with pytest.raises(ValueError, match="token_type has 1 items, 2 are needed"):
        load_tokenizer(write(tmp_path / "a.gguf", "llama", ["a", "b"], [NORMAL]))
    long = [("a" * 20_000 + str(i), NORMAL) for i in range(30)]
    with pytest.raises(ValueError, match="a.gguf.*294 pieces of up to 20,002 characters split"):
        load_tokenizer(pieces(tmp_path / "a.gguf", long))
    with pytest.raises(ValueError, match=r"scores\[0\]=nan is not finite"):
        load_tokenizer(pieces(tmp_path / "a.gguf", scores=[float("nan"), *[0.0] * 263]))


def test_a_large_vocabulary_is_read_quickly(tmp_path):
    letters = byte_letters()
    tokens = list(letters)
    for i in range(100_000):
        tokens.append(letters[i % 256] + letters[i // 256 % 256] + letters[33 + i // 65536])
    merges = [f"{a} {b}" for a in letters[33:126] for b in letters[33:126]]
    tokens += [merge.replace(" ", "") for merge in merges]
    special = dict(tokens=tokens, types=[NORMAL] * len(tokens), merges=merges, pre="qwen2")
    file = write(
        tmp_path / "a.gguf", "gpt2", special.pop("tokens"), special.pop("types"), **special
    )
    began = time.process_time()
    tokenizer = load_tokenizer(file)
    assert (
        time.process_time() - began < 3
    )  # 0.3 of a quiet processor; the reader of `gguf` takes 10
    assert tokenizer.vocab == len(tokens)


def test_chat_templates_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*byte_letters(), "ab"])
    writer.add_token_merges(["a b"])
    templates = [{"name": "default", "template": "usual"}, {"name": "tool_use", "template": "t"}]
    writer.add_chat_template(templates)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "a.gguf")
    assert (tokenizer.template, tokenizer.templates) == ("usual", {"tool_use": "t"})


@pytest.mark.parametrize("kind", [99, -1, 7])
def test_a_kind_that_is_none_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"token_type\[257\]=.*{kind}.* is no kind of a token"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", special=[("<x>", kind)]))


def test_more_tokens_than_any_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "_MOST_TOKENS", 300)
    monkeypatch.setattr(gguf_tokenizer, "_MOST_ADDED", 30)
    many = [(f"<{i}>", NORMAL) for i in range(44)]
    with pytest.raises(ValueError, match="tokenizer.ggml.tokens are 301, more than 300"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", special=many))
    whole = [(f"<{i}>", USER_DEFINED) for i in range(31)]
    with pytest.raises(ValueError, match="token_type: tokens found whole are 31, more than 30"):
        load_tokenizer(byte_level(tmp_path / "b.gguf", special=whole))
