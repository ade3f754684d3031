"""Serve a model: an engine that batches requests, and the HTTP interface that clients use.

    python -m serving --model FOLDER_OR_GGUF

From Python:

    engine = Engine(models.load("SmolLM2-135M-Instruct"), tokenizer)
    engine.generate(prompts, SamplingParams(max_tokens=32))

`engine` has the engine, `request` what a request may ask, `text` the text level, `api` the routes.

This package may import `wsekern`, `sharding` and `models`; only programs and tests may import it.
"""
