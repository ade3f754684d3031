"""Training of a language model on a wafer mesh: data, optimizer, step, checkpoints, metrics.

Run it as `python -m training`, or call it from Python. This folder may import `wsekern`, `sharding`
and `models`; nothing imports it but programs and tests.
"""
