"""The cases of `python -m benchmarks reliability`: what goes wrong on purpose, a file for each group."""
