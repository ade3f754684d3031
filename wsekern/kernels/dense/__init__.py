"""The small dense operations of a language model: norms, embedding, rotary positions, the loss."""
