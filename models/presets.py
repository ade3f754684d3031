"""All families of models, and all presets by name; imports no jax."""

import difflib
from types import ModuleType
from typing import Any

from models.checkpoints.json_file import shown
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
    architectures, kind = fields.get("architectures"), fields.get("model_type")
    if architectures is None:
        architectures = []
    if not isinstance(architectures, list):
        raise ValueError(f"architectures={shown(architectures)} is not a list of names")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"model_type={shown(kind)} is not a name")
    for name, family in FAMILIES.items():
        if architectures[:1] in ([family.ARCHITECTURE], [_without_head(family.ARCHITECTURE)]):
            # transformers goes by the model_type.
            if kind is not None and kind != name:
                raise ValueError(
                    f"model_type={kind!r}, but architectures={shown(architectures)}: one is wrong"
                )
            return family
    if not architectures and kind in FAMILIES:
        return FAMILIES[kind]
    known = ", ".join(family.ARCHITECTURE for family in FAMILIES.values())
    raise ValueError(
        f"architecture {shown(architectures[0] if architectures else kind)} is not one of {known}"
    )


def _without_head(architecture: str) -> str:
    """The name of the model without its head, whose checkpoints have the same weights."""
    return architecture.removesuffix("LMHeadModel").removesuffix("ForCausalLM") + "Model"
