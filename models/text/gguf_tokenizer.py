"""Build the tokenizer that a GGUF file describes in its metadata."""

import pathlib
from typing import Any

from models.checkpoints.gguf import read_header
from models.text import bpe
from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer

_CONTROL = 3  # GGUF's type of tokens that are not text
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def of_file(file: pathlib.Path) -> Tokenizer:
    """The tokenizer of a GGUF file; one token a byte if the file describes none.

    Raises:
      ValueError: the kind of tokenizer is unknown.
    """
    header = read_header(file)

    def get(name: str, default: Any = None) -> Any:
        return header.value(f"tokenizer.ggml.{name}", default)

    tokens, kind = get("tokens"), get("model")
    if tokens is None:
        return bytes_tokenizer()
    special = [(tokens[i], i) for i, t in enumerate(get("token_type", [])) if t == _CONTROL]
    begin = get("bos_token_id")
    before = [begin] if begin is not None and get("add_bos_token", kind == "llama") else []
    if kind == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in get("merges", [])]
        vocab = {token: i for i, token in enumerate(tokens)}
        inner = bpe.byte_level(
            vocab, merges, cut=get("pre", "default"), special=special, before=before
        )
    elif kind == "llama":
        inner = bpe.pieces(
            tokens,
            get("scores"),
            special=[name for name, _ in special],
            unknown=tokens[get("unknown_token_id", 0)],
            prefix=get("add_space_prefix", True),
            before=before,
        )
    else:
        raise ValueError(f"{file}: the tokenizer is of kind {kind!r}, known are 'gpt2', 'llama'")
    names = {
        name: tokens[get(f"{key}_token_id")]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
        if get(f"{key}_token_id") is not None
    }
    return Tokenizer(
        codec=FastCodec(inner),
        ends=tuple(dict.fromkeys(get(name) for name in _ENDS if get(name) is not None)),
        template=header.value("tokenizer.chat_template"),
        names=names,
        source=str(file),
    )
