"""Serve a model: an engine that batches requests, and the HTTP interface that clients use.

    python -m serving --model FOLDER_OR_GGUF

This package may import `wsekern`, `sharding` and `models`; only programs and tests may import it.
"""
