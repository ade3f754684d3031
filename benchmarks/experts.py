"""A mixture of experts on one device against one dense feed-forward of the same FLOPs.

All candidates run in turn, forward alone and with the gradient. The ratio is to the dense
feed-forward, which has one expert's weights and a row for every choice of every token.
Command: `python -m benchmarks experts`
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tyro

from benchmarks import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsOptions:
    """Time tokens routed through their experts on one device, forward and with the gradient.

    With --peers, `ragged_dot` (the same routing with XLA's grouped product) and `loop` (every
    expert on every token) are timed too. They take long: give few tokens.
    """

    tokens: tuple[int, ...] = (512, 2048)
    """Tokens in a batch."""
    d_model: int = 1024
    """Features of a token."""
    d_ff: int = 512
    """Features of an expert's hidden layer."""
    experts: int = 128
    """How many experts there are."""
    chosen: int = 8
    """How many experts a token goes to."""
    peers: bool = False
    """Time ragged_dot and the loop as well."""
    rounds: int = 5
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table for each number of tokens, forward and backward."""
    options = tyro.cli(ExpertsOptions, prog="python -m benchmarks experts", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    for tokens in options.tokens:
        for backward in (False, True):
            title = f"{options.chosen} of {options.experts} experts, {tokens} tokens"
            title += ", forward and backward" if backward else ", forward"
            results = harness.compare(
                _candidates(options, tokens, backward), "dense", rounds=options.rounds
            )
            harness.show(title, results)
            tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _candidates(
    options: ExpertsOptions, tokens: int, backward: bool
) -> Mapping[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    import wsekern as wk

    D, F, E, k = options.d_model, options.d_ff, options.experts, options.chosen
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (1, tokens, D))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = tuple(
        jax.random.normal(key, shape) / shape[1] ** 0.5
        for key, shape in zip(keys[1:4], shapes, strict=True)
    )
    scores = jax.random.normal(keys[4], (1, tokens, E))
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores), k)

    def ours(x, shares, weights):
        return wk.experts(x, chosen, shares, weights, activation=_swiglu)

    def dense(x, shares, weights):
        gate, up, down = weights
        return (_swiglu(x @ gate, x @ up) @ down).reshape(1, tokens, k, D).sum(2)

    cases = {
        "dense": (dense, jnp.repeat(x, k, axis=1), tuple(w[0] for w in weights)),
        "ours": (ours, x, weights),
    }
    if options.peers:
        cases["ragged_dot"] = (functools.partial(_ragged_dot_experts, chosen=chosen), x, weights)
        cases["loop"] = (functools.partial(_loop_over_experts, chosen=chosen), x, weights)

    def case(function, x, weights):
        if not backward:
            return harness.compile_program(function, x, shares, weights)
        loss = lambda *a: (function(*a) ** 2).sum()  # noqa: E731
        return harness.compile_program(jax.grad(loss, argnums=(0, 1, 2)), x, shares, weights)

    return {name: case(*case_) for name, case_ in cases.items()}


def _swiglu(gate, up):
    import jax

    return jax.nn.silu(gate) * up


def _ragged_dot_experts(x, shares, weights, chosen):
    import jax
    import jax.numpy as jnp

    (gate, up, down), k = weights, chosen.shape[-1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    rows, counts = x[0][order // k], jnp.bincount(chosen.reshape(-1), length=len(gate))
    hidden = _swiglu(*(jax.lax.ragged_dot(rows, w, counts) for w in (gate, up)))
    out = jax.lax.ragged_dot(hidden, down, counts)[jnp.argsort(order)]
    return (out.reshape(*chosen.shape, -1) * shares[..., None]).sum(2)


def _loop_over_experts(x, shares, weights, chosen):
    import jax
    import jax.numpy as jnp

    def add(total, expert):
        e, gate, up, down = expert
        share = (shares * (chosen == e)).sum(-1, keepdims=True)
        return total + share * (_swiglu(x @ gate, x @ up) @ down), None

    return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(len(weights[0])), *weights))[0]
