"""The commands beside serving itself: `bench` times a server, `chat` talks, `soak` wears one out.

Each is a client; only `chat --model`, which needs no server, imports jax.
"""
