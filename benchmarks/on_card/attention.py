"""Attention on the card against cuDNN called directly; where there is none, against `jax.nn`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import wsekern as wk
from benchmarks import harness
from benchmarks.on_card.race import Build, on_wafers, race
from benchmarks.on_card.session import Session

_COST, _DECODE_COST = 5.0, 4.0  # seconds to compile and time one candidate
_N, _K, _H = 32, 8, 128
_BACKWARD = 2.5  # FLOPs of a gradient over those of the result: five products for two


def run(session: Session) -> None:
    """Races causal attention, forward and with the gradient, a window, and a step of decoding."""
    lengths = ((256, 1),) if session.small else ((4096, 4), (16384, 1))
    for T, B in lengths:
        for backward in (False, True):
            _race(session, B, T, backward=backward)
    T, B = lengths[-1]
    _race(session, B, T, window=T // 16)
    for batch in (1, 32):
        _race_decoding(session, batch, 512 if session.small else 8192)


def _race(
    session: Session,
    B: int,
    T: int,
    *,
    backward: bool = False,
    window: int | None = None,
) -> None:
    implementation: Any = "cudnn" if jax.default_backend() == "gpu" else None
    peer = "cuDNN" if implementation else "jax.nn"

    def plain(q: Any, k: Any, v: Any) -> Any:
        seen = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=seen, implementation=implementation
        )

    def ours(make_wafer: Callable) -> harness.CompiledProgram:
        wafer = make_wafer()
        return build(functools.partial(wk.attention, causal=True, window=window, wafer=wafer))

    def build(attention: Callable) -> harness.CompiledProgram:
        def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
            out, pull = jax.vjp(attention, q, k, v)
            return out, pull(dout)

        operands = _operands(B, T)
        if backward:
            return harness.compile_program(both, *operands, operands[0])
        return harness.compile_program(attention, *operands)

    candidates: dict[str, Build] = {peer: lambda: build(plain)}
    candidates |= on_wafers(ours, one_pe=not session.has_raced())
    words = [f"causal, B={B} T={T} N={_N} K={_K} H={_H}, bfloat16"]
    words += [f"window {window}"] * (window is not None)
    words += ["forward and backward" if backward else "forward"]
    # Of the pairs of a query and a key that is seen.
    pairs = T * (T + 1) / 2 if window is None else window * (T - (window - 1) / 2)
    race(
        session,
        ", ".join(words),
        candidates,
        peer=peer,
        work=4 * B * _N * _H * pairs * (1 + _BACKWARD * backward),
        unit="FLOP/s",
        ceiling=session.ceilings.rated,
        cost=_COST,
    )


def _operands(B: int, T: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, n, _H) for n in (_N, _K, _K)]
    return [jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, shapes, strict=True)]


def _race_decoding(session: Session, B: int, capacity: int) -> None:
    """One token of each sequence attends to a full cache, which is read once."""

    def query() -> jax.Array:
        return jax.random.normal(jax.random.key(1), (B, 1, _N, _H), "bfloat16")

    def ours(make_wafer: Callable) -> harness.CompiledProgram:
        cache = wk.KVCache.empty(
            batch=B,
            capacity=capacity,
            kv_heads=_K,
            heads=_N,
            head_size=_H,
            dtype="bfloat16",
            wafer=make_wafer(),
        ).fill(*_operands(B, capacity)[1:])
        return harness.compile_program(wk.decode_attention, query(), cache)

    def plain() -> harness.CompiledProgram:
        _, k, v = _operands(B, capacity)
        lengths = jnp.full(B, capacity, jnp.int32)

        def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
            return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)

        return harness.compile_program(attend, query(), k, v, lengths)

    candidates: dict[str, Build] = {"jax.nn": plain}
    candidates |= on_wafers(ours, one_pe=not session.has_raced())
    race(
        session,
        f"decoding, B={B} S={capacity} N={_N} K={_K} H={_H}, bfloat16",
        candidates,
        peer="jax.nn",
        work=2 * 2 * B * capacity * _K * _H,
        unit="B/s",
        ceiling=session.ceilings.bandwidth,
        cost=_DECODE_COST,
    )
