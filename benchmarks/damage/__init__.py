"""The cases of `python -m benchmarks reliability`: what goes wrong on purpose, by group."""
