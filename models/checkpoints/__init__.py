"""Read Hugging Face checkpoints and GGUF files onto a wafer, and write them back."""
