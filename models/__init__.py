"""Decoder-only language models in Flax, on the kernels of `wsekern`.

    import models

    model = models.load("SmolLM2-135M-Instruct")  # a folder, a GGUF file, or a hub id
    logits = model(tokens)  # [B, T] int32 to [B, T, V] float32
    text = models.generate(model, tokens, max_new_tokens=64)
    models.save(model, "folder")  # transformers reads it too

A model knows no mesh: inside `with wafer:` it runs on that wafer. `list_presets()` names the sizes
that come with the library. `find_preset` gives one, to build a `Decoder` with random weights.

Names are loaded when first used, so that `python -m models --help` needs no jax.
"""

from typing import TYPE_CHECKING

from wsekern.moved import put_up_signposts
from wsekern.public_names import lazy_names

if TYPE_CHECKING:
    from models.checkpoints.reading import load as load
    from models.checkpoints.reading import read_config as read_config
    from models.checkpoints.saving import save as save
    from models.config import DecoderConfig as DecoderConfig
    from models.config import ExpertsConfig as ExpertsConfig
    from models.config import RopeScaling as RopeScaling
    from models.decoder import Decoder as Decoder
    from models.generation import generate as generate
    from models.generation import stream as stream
    from models.presets import find_preset as find_preset
    from models.presets import list_presets as list_presets
    from models.quantization import quantize as quantize
    from models.sampling import Sampling as Sampling
    from models.text.reading import load_tokenizer as load_tokenizer
    from models.text.tokenizer import Tokenizer as Tokenizer

# Public name -> the module below `models` that defines it.
_HOMES = {
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "ExpertsConfig": "config",
    "RopeScaling": "config",
    "Sampling": "sampling",
    "Tokenizer": "text.tokenizer",
    "find_preset": "presets",
    "generate": "generation",
    "list_presets": "presets",
    "load": "checkpoints.reading",
    "load_tokenizer": "text.reading",
    "quantize": "quantization",
    "read_config": "checkpoints.reading",
    "save": "checkpoints.saving",
    "stream": "generation",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)

put_up_signposts()  # `import models.llama` names the module's new place
