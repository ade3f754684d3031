"""Text to tokens and back: the tokenizers and chat templates of checkpoints."""
