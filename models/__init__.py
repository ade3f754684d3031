"""The Flax model zoo: decoders built with no mesh at hand, on the kernels of `wsekern`.

May import `wsekern` and `sharding`; `training` and `serving` stand above it. Import the file that
you mean: `from models.decoder import Decoder`, `from models.presets import find_preset`.
"""
