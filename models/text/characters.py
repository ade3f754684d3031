"""A tokenizer.json whose tokens are single characters, as models of characters need."""

import json
import pathlib
from typing import Any

from wsekern.atomic_write import atomic_write


def save_characters(alphabet: str, folder: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for `load_tokenizer` and transformers.

    A text with another character is refused when it is encoded: there is no token for it.

    Args:
      alphabet: the character of each token, in order; no character twice.
      folder: where to write; each file is written whole or not at all.
    """
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        # Every character is a word of its own; unlike a dot, the pattern takes line ends too.
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},  # joins the characters again, with no spaces between
        "model": {
            "type": "WordLevel",
            "vocab": {character: token for token, character in enumerate(alphabet)},
            # It must be named, and is not in the vocabulary: so an unknown character is an error.
            "unk_token": "<unknown>",
        },
    }
    # transformers would else write " ." as ".", and so on.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, fields in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        with atomic_write(folder / name) as file:
            file.write(json.dumps(fields, indent=1, ensure_ascii=False).encode())
