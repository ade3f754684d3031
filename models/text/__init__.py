"""Text and tokens: tokenizers as checkpoints bring them, chat templates, streams of text."""
