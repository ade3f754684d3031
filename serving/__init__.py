"""Serving, to come: an engine that batches requests, sampling, and an HTTP interface.

Until then `models.generate` samples from a model. This package may import `wsekern`, `sharding` and
`models`; only programs and tests may import it.
"""
