"""The text of requests and answers: prompts, stop strings, tool calls, grammars; no jax."""
