"""All families of models, and all presets by name; imports no jax."""

import difflib
from types import ModuleType
from typing import Any

from models.config import DecoderConfig
from models.families import gpt2, gpt_oss, llama, qwen2, qwen3, qwen3_moe

# By `DecoderConfig.family`. Each module has PRESETS, NAMES, ARCHITECTURE, MODEL_TYPE, from_fields
# and to_fields.
FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}
PRESETS: dict[str, DecoderConfig] = {
    name: config for family in FAMILIES.values() for name, config in family.PRESETS.items()
}


def list_presets() -> list[str]:
    """The names that `find_preset` knows, family by family."""
    return list(PRESETS)


def find_preset(name: str) -> DecoderConfig:
    """The sizes and choices of the model called `name`; `list_presets` has all names.

    Raises:
      ValueError: there is no such preset; suggests the nearest name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset={name!r} is not one of {list(PRESETS)}{hint}")
    return PRESETS[name]


def find_family(fields: dict[str, Any]) -> ModuleType:
    """The family of a checkpoint, by its config.json.

    Raises:
      ValueError: it is none of `FAMILIES`.
    """
    architectures = fields.get("architectures") or [None]
    for family in FAMILIES.values():
        if architectures[0] == family.ARCHITECTURE:
            return family
    kind = fields.get("model_type")
    if architectures[0] is None and kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(family.ARCHITECTURE for family in FAMILIES.values())
    raise ValueError(
        f"config.json: architecture {architectures[0] or kind!r} is not one of {known}"
    )
