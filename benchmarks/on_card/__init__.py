"""The sections of `python -m benchmarks card`: what is checked and timed on a real card."""
