"""Matrix products on the card against `jnp.matmul`, which is the vendor's library on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import wsekern as wk
from benchmarks import harness
from benchmarks.on_card.race import Build, on_wafers, race
from benchmarks.on_card.session import Session

_COST = 3.0  # seconds to compile and time one candidate
_PEER = "jnp.matmul"


def run(session: Session) -> None:
    """Races square products, the forms of a gradient, a fused one, int8 weights and few rows."""
    for size in (128,) if session.small else (8192, 4096, 16384):
        _race(session, f"{size} x {size} x {size}", (size,) * 3)
    M, K, N = (64, 128, 96) if session.small else (8192, 4096, 14336)
    _race(session, f"{M} x {K} x {N}, bias and gelu", (M, K, N), _fused, _plain_fused, bias=True)
    _race(session, f"{M} x {K} x {N}, b transposed", (M, K, N), _transposed_b, _plain_b, turn="b")
    _race(session, f"{M} x {K} x {N}, a transposed", (M, K, N), _transposed_a, _plain_a, turn="a")
    rows = 8 if session.small else 64
    _race(session, f"{rows} x {K} x {N}, few rows", (rows, K, N))


def _race(
    session: Session,
    name: str,
    sizes: tuple[int, int, int],
    ours: Callable = wk.matmul,
    plain: Callable = jnp.matmul,
    *,
    bias: bool = False,
    turn: str = "",
) -> None:
    M, K, N = sizes

    def operands() -> list[jax.Array]:
        of_a, of_b = (K, M) if turn == "a" else (M, K), (N, K) if turn == "b" else (K, N)
        shapes: list[tuple[int, ...]] = [of_a, of_b]
        keys = jax.random.split(jax.random.key(0), 3)
        shapes += [(N,)] if bias else []
        return [jax.random.normal(k, s, "bfloat16") for k, s in zip(keys, shapes, strict=False)]

    def build(make_wafer: Callable) -> harness.CompiledProgram:
        return harness.compile_program(functools.partial(ours, wafer=make_wafer()), *operands())

    candidates: dict[str, Build] = {_PEER: lambda: harness.compile_program(plain, *operands())}
    candidates |= on_wafers(build, one_pe=not session.has_raced())
    race(
        session,
        f"{name}, bfloat16",
        candidates,
        peer=_PEER,
        work=2 * M * K * N,
        unit="FLOP/s",
        ceiling=session.ceilings.rated,
        cost=_COST,
    )


def _fused(a: Any, b: Any, bias: Any, wafer: Any) -> Any:
    return wk.matmul(a, b, bias=bias, activation="gelu_tanh", wafer=wafer)


def _plain_fused(a: Any, b: Any, bias: Any) -> Any:
    return jax.nn.gelu(a @ b + bias[None])


_transposed_a = functools.partial(wk.matmul, transpose_a=True)
_transposed_b = functools.partial(wk.matmul, transpose_b=True)


def _plain_a(a: Any, b: Any) -> Any:
    return a.T @ b


def _plain_b(a: Any, b: Any) -> Any:
    return a @ b.T
