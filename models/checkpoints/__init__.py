"""Checkpoints of the Hugging Face kind, read onto a wafer and written back."""
