"""`python -m serving soak`: keep a server at full load, and see whether it stays as it was."""
