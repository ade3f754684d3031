"""This file is every preset by its name; it imports no jax."""

import difflib

from models import gpt2, llama
from models.config import DecoderConfig

PRESETS: dict[str, DecoderConfig] = {**llama.PRESETS, **gpt2.PRESETS}


def find_preset(name: str) -> DecoderConfig:
    """The sizes that go by `name`.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset={name!r} is not one of {list(PRESETS)}{hint}")
    return PRESETS[name]
