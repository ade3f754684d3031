"""Serve a model: an engine that batches requests, and the HTTP interface that clients use.

    python -m serving --model FOLDER_OR_GGUF

From Python:

    from serving import Engine, SamplingParams

    engine = Engine(models.load("SmolLM2-135M-Instruct"), tokenizer)
    engine.generate(prompts, SamplingParams(max_tokens=32))

`engine` has the engine, `request` what a request may ask, `text` the text level, `api` the routes.

This package may import `wsekern`, `sharding` and `models`; only programs and tests may import it.
Names are loaded when first used, so that `python -m serving --help` loads no jax.
"""

from typing import TYPE_CHECKING

from wsekern.public_names import lazy_names

if TYPE_CHECKING:
    from serving.engine import Completion as Completion
    from serving.engine import Engine as Engine
    from serving.engine import EngineClosed as EngineClosed
    from serving.engine import EngineSnapshot as EngineSnapshot
    from serving.engine import Slot as Slot
    from serving.generation import Generation as Generation
    from serving.prompt_cache import PromptCache as PromptCache
    from serving.request import Delta as Delta
    from serving.request import PromptTooLong as PromptTooLong
    from serving.request import QueueFull as QueueFull
    from serving.request import SamplingParams as SamplingParams
    from serving.request import TokenLogprobs as TokenLogprobs
    from serving.request import Usage as Usage

# Public name -> the module below `serving` that defines it.
_HOMES = {
    "Completion": "engine",
    "Delta": "request",
    "Engine": "engine",
    "EngineClosed": "engine",
    "EngineSnapshot": "engine",
    "Generation": "generation",
    "PromptCache": "prompt_cache",
    "PromptTooLong": "request",
    "QueueFull": "request",
    "SamplingParams": "request",
    "Slot": "engine",
    "TokenLogprobs": "request",
    "Usage": "request",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
