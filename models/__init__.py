"""The Flax model zoo: decoders built with no mesh at hand, on the kernels of `wsekern`.

    model = models.load("SmolLM2-135M-Instruct")
    logits = model(tokens)
    models.save(model, "folder")

May import `wsekern` and `sharding`; `training` and `serving` stand above it. Inside the house,
import the file that you mean: `from models.decoder import Decoder`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.checkpoints.reading import load as load
    from models.checkpoints.saving import save as save
    from models.decoder import Decoder as Decoder
    from models.generation import generate as generate
    from models.presets import find_preset as find_preset

# Public name -> the file that has it: imported when it is asked for, so that `--help` needs no jax.
_WHERE = {
    "Decoder": "decoder",
    "find_preset": "presets",
    "generate": "generation",
    "load": "checkpoints.reading",
    "save": "checkpoints.saving",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"models.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
