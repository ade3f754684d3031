"""The place of serving: an engine that batches requests, sampling, and an HTTP interface.

Nothing stands here yet; `models.generate` samples from a model in the meantime. What comes may
import `wsekern`, `sharding` and `models`; nothing but programs and tests may import it.
"""
