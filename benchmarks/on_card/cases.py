"""What is checked on a card: every public operation, with operands and a plain reference."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wsekern as wk
from benchmarks import plain_stencil
from benchmarks.on_card import references
from benchmarks.on_card.stencils import wave
from wsekern.wafer.wafer import Wafer

ALONE, ONE_PE, VIRTUAL = "no wafer", "1x1", "virtual 2x2"
_STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedCall:
    """One call of an operation."""

    operation: str  # its public name
    name: str = ""  # which of its forms
    operands: tuple[np.ndarray, ...]  # floating ones are cast to the dtype of a check
    ours: Callable[..., Any]  # of the wafer or None, and the operands
    plain: Callable[..., Any]  # of the operands
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    wafers: tuple[str, ...] = (ALONE, ONE_PE, VIRTUAL)
    gradient: bool = True
    factor: float = 1.0  # on the tolerances of its dtype


def cases(small: bool) -> list[CheckedCall]:
    """All of them, in the order in which they are checked."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    scale = 8 if small else 1
    makers = (_products, _attention, _decoding, _paging, _dense, _experts, _stencils, _solvers)
    return [case for make in makers for case in make(normal, scale)]


def _products(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    M, K, N = 768 // scale, 1024 // scale, 512 // scale
    a, b, bias = normal(M, K), normal(K, N) / K**0.5, normal(N)
    whole = np.clip(np.round(normal(K, N) * 40), -127, 127).astype(np.int8)
    scales = np.abs(normal(N)) / 40 / K**0.5

    def case(
        name: str, operands: tuple, ours: Callable, plain: Callable, **more: Any
    ) -> CheckedCall:
        operation = "gemv" if name.startswith("gemv") else "matmul"
        return CheckedCall(
            operation=operation,
            name=name.removeprefix("gemv").strip(),
            operands=operands,
            ours=lambda wafer, *operands: ours(*operands, wafer=wafer),
            plain=plain,
            **more,
        )

    def fused(a: Any, b: Any, bias: Any, wafer: Any) -> Any:
        return wk.matmul(a, b, bias=bias, activation="gelu", wafer=wafer)

    def in_eights(a: Any, whole: Any, scales: Any, wafer: Any) -> Any:
        return wk.matmul(a, whole, scales=scales, wafer=wafer)

    def several(a: Any, b: Any, c: Any, wafer: Any) -> Any:
        return wk.matmul(a, (b, c), wafer=wafer)

    def gemv_in_eights(x: Any, whole: Any, scales: Any, bias: Any, wafer: Any) -> Any:
        options: dict[str, Any] = {"scales": scales, "bias": bias, "activation": "silu"}
        return wk.gemv(x, whole, **options, wafer=wafer)

    def widened(a: Any, whole: Any, scales: Any) -> Any:
        return a @ whole.astype(jnp.float32) * scales[None]

    transposed = functools.partial(wk.matmul, transpose_b=True)
    yield case("", (a, b), wk.matmul, jnp.matmul)
    yield case("b transposed", (a, b.T.copy()), transposed, lambda a, b: a @ b.T)
    transposed = functools.partial(wk.matmul, transpose_a=True)
    yield case("a transposed", (a.T.copy(), b), transposed, lambda a, b: a.T @ b)
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    yield case("bias and gelu", (a, b, bias), fused, lambda a, b, c: gelu(a @ b + c[None]))
    yield case("int8 weights", (a, whole, scales), in_eights, widened)
    both = (a, b, normal(K, N // 2) / K**0.5)
    yield case("two right factors", both, several, lambda a, b, c: (a @ b, a @ c))
    yield case("batch", (normal(3, M, K), b), wk.matmul, lambda a, b: jnp.einsum("imk,kn", a, b))
    uneven = normal(M + 5, K // 2 + 3), normal(K // 2 + 3, N + 7) / K**0.5
    yield case("uneven sizes", uneven, wk.matmul, jnp.matmul)
    x = normal(K)
    yield case("gemv", (x, b), wk.gemv, jnp.matmul)
    transposed = functools.partial(wk.gemv, transpose_b=True)
    yield case("gemv b transposed", (x, b.T.copy()), transposed, lambda x, b: x @ b.T)
    yield case(
        "gemv int8 weights, bias and silu",
        (x, whole, scales, bias),
        gemv_in_eights,
        lambda x, w, scales, bias: jax.nn.silu((x @ w.astype(jnp.float32)) * scales + bias),
    )


def _attention(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    B, T, N, K, H = 2, 1024 // scale, 8, 2, 128 // scale
    q, k, v = normal(B, T, N, H), normal(B, T, K, H), normal(B, T, K, H)
    segments = np.sort(np.random.default_rng(1).integers(0, 5, (B, T))).astype(np.int32)
    variants: dict[str, tuple[tuple[np.ndarray, ...], dict[str, Any]]] = {
        "causal": ((q, k, v), {"causal": True}),
        "full": ((q, k, v), {}),
        "window": ((q, k, v), {"causal": True, "window": T // 5}),
        "as many heads": ((q, normal(B, T, N, H), normal(B, T, N, H)), {"causal": True}),
        "head size 64": (tuple(x[..., : H // 2] for x in (q, k, v)), {"causal": True}),
        "fewer keys": ((q, k[:, : T // 2], v[:, : T // 2]), {}),
        "soft cap": ((q, k, v), {"causal": True, "soft_cap": 5.0}),
        "segments": ((q, k, v, segments), {"causal": True}),
        "sinks": ((q, k, v, normal(N)), {"causal": True}),
        "bias": ((q, k, v, normal(1, N, T, T)), {}),
    }

    def case(name: str, operands: tuple, options: dict, **more: Any) -> CheckedCall:
        fourth = {"segments": "segment_ids", "sinks": "sinks", "bias": "bias"}.get(name)

        def call(function: Callable, *operands: Any, **more: Any) -> Any:
            named = {fourth: operands[3]} if fourth else {}
            return function(*operands[:3], **named, **options, **more)

        algorithm = more.pop("algorithm", "auto")
        return CheckedCall(
            operation="attention",
            name=name if algorithm == "auto" else f"{name} by {algorithm}",
            operands=operands,
            ours=lambda wafer, *operands: call(
                wk.attention, *operands, wafer=wafer, algorithm=algorithm
            ),
            plain=functools.partial(call, references.attention),
            **more,
        )

    for name, (operands, options) in variants.items():
        yield case(name, operands, options)
    for name in ("causal", "window", "full"):
        for algorithm in ("ring", "ulysses", "allgather"):
            yield case(name, *variants[name], algorithm=algorithm, wafers=(VIRTUAL,))


def _decoding(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    B, S, N, K, H = 3, 512 // scale, 8, 2, 128 // scale
    window = S // 4
    q, k, v = normal(B, 2, N, H), normal(B, S, K, H), normal(B, S, K, H)

    def ours(wafer: Wafer | None, q: Any, k: Any, v: Any, sinks: Any, options: dict) -> Any:
        sizes = {"batch": B, "capacity": S + 8, "kv_heads": K, "heads": N, "head_size": H}
        cache = wk.KVCache.empty(
            **sizes, chunk=2, window=options.get("window"), dtype=k.dtype, wafer=wafer
        )
        cache = cache.fill(k[:, :-2], v[:, :-2]).append(k[:, -2:], v[:, -2:])
        return wk.decode_attention(q, cache, sinks=sinks, soft_cap=options.get("soft_cap"))

    def plain(q: Any, k: Any, v: Any, sinks: Any, options: dict) -> Any:
        return references.attention(q, k, v, None, sinks, causal=True, first=S - 2, **options)

    variants: dict[str, tuple[np.ndarray | None, dict[str, Any]]] = {
        "": (None, {}),
        "window": (None, {"window": window}),
        "sinks and soft cap": (normal(N), {"soft_cap": 5.0}),
    }
    for name, (sinks, options) in variants.items():
        extra = () if sinks is None else (sinks,)
        yield CheckedCall(
            operation="decode_attention",
            name=name,
            operands=(q, k, v, *extra),
            ours=lambda wafer, q, k, v, sinks=None, options=options: ours(
                wafer, q, k, v, sinks, options
            ),
            plain=lambda q, k, v, sinks=None, options=options: plain(q, k, v, sinks, options),
            gradient=False,
        )


def _paging(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    B, S, N, K, H, page = 3, 512 // scale, 8, 2, 128 // scale, 16
    pages = -(-S // page)
    q, k, v = normal(B, 2, N, H), normal(B, S, K, H), normal(B, S, K, H)
    tables = np.random.default_rng(3).permutation(B * pages).reshape(B, pages).astype(np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))

    def ours(wafer: Wafer | None, q: Any, k: Any, v: Any) -> Any:
        cache = wk.KVPages.empty(
            layers=1,
            pages=B * pages,
            page_tokens=page,
            kv_heads=K,
            heads=N,
            head_size=H,
            dtype=k.dtype,
            wafer=wafer,
        )
        cache = cache.write(0, k, v, jnp.asarray(tables), jnp.asarray(positions))
        return wk.paged_attention(q, cache, 0, jnp.asarray(tables), jnp.asarray(positions[:, -2:]))

    def plain(q: Any, k: Any, v: Any) -> Any:
        return references.attention(q, k, v, None, None, causal=True, first=S - 2)

    yield CheckedCall(
        operation="paged_attention", operands=(q, k, v), ours=ours, plain=plain, gradient=False
    )


def _dense(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    B, T, D, V = 2, 512 // scale, 1024 // scale, 8192 // scale
    x, factor, bias = normal(B, T, D), normal(D), normal(D)
    words = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)

    def case(operation: str, operands: tuple, plain: Callable, **more: Any) -> CheckedCall:
        def ours(wafer: Wafer | None, *operands: Any) -> Any:
            return getattr(wk, operation)(*operands, wafer=wafer)

        return CheckedCall(operation=operation, operands=operands, ours=ours, plain=plain, **more)

    yield case("rms_norm", (x, factor), references.rms_norm)
    yield case("layer_norm", (x, factor, bias), references.layer_norm)
    yield case("cross_entropy", (3 * normal(B, T, V), words), references.cross_entropy)
    yield case("embedding", (words, normal(V, D)), lambda words, table: table[words])
    yield case("rotary", (normal(B, T, 8, 64),), references.rotary)


def _experts(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    B, T, D, F, E, k = 2, 256 // scale, 512 // scale, 256 // scale, 8, 2
    x, scores = normal(B, T, D), normal(B, T, E)
    weights = normal(E, D, F) / D**0.5, normal(E, D, F) / D**0.5, normal(E, F, D) / F**0.5
    chosen = np.argsort(-scores, -1)[..., :k].astype(np.int32)
    shares = np.exp(np.take_along_axis(scores, chosen, -1))
    shares /= shares.sum(-1, keepdims=True)

    def swiglu(gate: Any, up: Any) -> Any:
        return jax.nn.silu(gate) * up

    def ours(wafer: Wafer | None, x: Any, chosen: Any, shares: Any, *weights: Any) -> Any:
        return wk.experts(x, chosen, shares, weights, activation=swiglu, wafer=wafer)

    def plain(x: Any, chosen: Any, shares: Any, *weights: Any) -> Any:
        return references.experts(x, chosen, shares, weights, swiglu)

    yield CheckedCall(
        operation="experts", operands=(x, chosen, shares, *weights), ours=ours, plain=plain
    )
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    yield CheckedCall(
        operation="load_balance_loss",
        operands=(probabilities, chosen),
        ours=lambda wafer, *operands: wk.load_balance_loss(*operands),
        plain=references.load_balance_loss,
        wafers=(ALONE,),
    )


def _stencils(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    size = 1024 // scale
    u = normal(size, size)

    def case(name: str, operands: tuple, ours: Callable, plain: Callable) -> CheckedCall:
        return CheckedCall(
            operation="stencil", name=name, operands=operands, ours=ours, plain=plain,
            dtypes=("float32",),
        )  # fmt: skip

    def run(wafer: Wafer | None, u: Any, name: str, **options: Any) -> Any:
        radius = plain_stencil.RADII[name]
        options = {"radius": radius, "steps": _STEPS, "wafer": wafer} | options
        return wk.stencil(u, plain_stencil.UPDATES[name], **options)

    def by_pad(u: Any, name: str, radius: int, boundary: str) -> Any:
        return references.steps(u, plain_stencil.UPDATES[name], _STEPS, radius, boundary)

    boundaries = {"zero": "constant", "periodic": "wrap", "reflect": "reflect"}
    for (boundary, mode), name in zip(
        boundaries.items(), ("5-point", "9-point", "5-point"), strict=True
    ):
        yield case(
            f"{name}, {boundary}",
            (u,),
            functools.partial(run, name=name, boundary=boundary),
            functools.partial(by_pad, name=name, radius=1, boundary=mode),
        )
    side = 48 if scale == 1 else 16
    yield case(
        "25-point, periodic",
        (normal(side, side, 16),),
        functools.partial(run, name="25-point", boundary="periodic"),
        functools.partial(by_pad, name="25-point", radius=4, boundary="wrap"),
    )
    yield case(
        "5-point, checkpointed",
        (u,),
        functools.partial(run, name="5-point", boundary="zero", checkpoint="sqrt"),
        functools.partial(by_pad, name="5-point", radius=1, boundary="constant"),
    )
    at = np.array([[3, 5], [size // 2, size - 2]], np.int32)

    def of_wave(wafer: Wafer | None, u: Any, c: Any, pulses: Any) -> Any:
        options: dict[str, Any] = {
            "coefficients": c,
            "sources": wk.Sources(at=at, values=pulses, field="u"),
        }
        options["receivers"] = wk.Receivers(at=at, field="u")
        fields = {"u": u, "before": u}
        fields, heard = wk.stencil(fields, wave, radius=1, steps=_STEPS, wafer=wafer, **options)
        return fields["u"], heard

    def plain_wave(u: Any, c: Any, pulses: Any) -> Any:
        where = tuple(at.T)

        def step(state: Any, pulse: Any) -> tuple[Any, Any]:
            state = wave(jax.tree.map(lambda f: jnp.pad(f, 1), state), jnp.pad(c, 1, mode="edge"))
            state["u"] = state["u"].at[where].add(pulse)
            return state, state["u"][where]

        state, heard = jax.lax.scan(step, {"u": u, "before": u}, pulses)
        return state["u"], heard

    speeds = 0.1 + 0.1 * np.abs(np.tanh(u))
    operands = (u, speeds, normal(_STEPS, len(at)))
    yield case("wave, sources and receivers", operands, of_wave, plain_wave)
    yield CheckedCall(
        operation="halo_exchange",
        operands=(u,),
        ours=lambda wafer, u: wk.halo_exchange(u, 2, boundary="periodic", wafer=wafer),
        plain=lambda u: jnp.pad(u, 2, mode="wrap"),
        wafers=(ALONE, ONE_PE),
    )
    yield CheckedCall(
        operation="halo_exchange",
        name="and crop",
        operands=(u,),
        ours=lambda wafer, u: wk.crop(wk.halo_exchange(u, 2, wafer=wafer), 2, wafer=wafer),
        plain=lambda u: u,
        wafers=(ONE_PE, VIRTUAL),
    )


def _solvers(normal: Callable, scale: int) -> Iterator[CheckedCall]:
    """Solves for `b`, applies the operator to the solution: that must be `b` again."""
    b = normal(256 // scale, 256 // scale)

    def laplacian(shift: float, wind: float, level: int, wafer: Wafer | None) -> Callable:
        def update(u: Any) -> Any:
            down, up = u[2:, 1:-1], u[:-2, 1:-1]
            flow = (4 + shift) * u[1:-1, 1:-1] - down - up - u[1:-1, 2:] - u[1:-1, :-2]
            return (flow + wind * (down - up)) / level**2

        return functools.partial(
            wk.stencil, update=update, radius=1, boundary=lambda near: -near, wafer=wafer
        )

    options: dict[str, Any] = {"tolerance": 1e-5, "max_iterations": 4000}

    def case(operation: str, solve: Callable) -> CheckedCall:
        def ours(wafer: Wafer | None, b: Any) -> Any:
            operator = functools.partial(laplacian, wafer=wafer)
            x, matrix = solve(operator, b)
            return matrix(x)

        return CheckedCall(
            operation=operation,
            operands=(b,),
            ours=ours,
            plain=lambda b: b,
            dtypes=("float32",),
            factor=10.0,  # a solver stops at its own tolerance, far above rounding
        )

    # Shifted, so that an error of a solution is not much larger than its residual.
    def by_cg(operator: Callable, b: Any) -> Any:
        return wk.cg(operator(0.5, 0.0, 1), b, **options).x, operator(0.5, 0.0, 1)

    def by_bicgstab(operator: Callable, b: Any) -> Any:
        return wk.bicgstab(operator(0.5, 0.3, 1), b, **options).x, operator(0.5, 0.3, 1)

    def by_jacobi(operator: Callable, b: Any) -> Any:
        x = wk.jacobi(operator(0.5, 0.1, 1), b, diagonal=4.5, **options).x
        return x, operator(0.5, 0.1, 1)

    def by_multigrid(operator: Callable, b: Any) -> Any:
        at = functools.partial(operator, 0.0, 0.0)
        return wk.multigrid(at, b, diagonal_at=diagonal_at, tolerance=1e-5).x, at(1)

    def by_cycles(operator: Callable, b: Any) -> Any:
        at = functools.partial(operator, 0.0, 0.0)
        cycle = wk.v_cycle(at, b.shape, diagonal_at=diagonal_at)
        return wk.cg(at(1), b, preconditioner=cycle, **options).x, at(1)

    def diagonal_at(level: int) -> float:
        return 4 / level**2

    solvers = {"cg": by_cg, "bicgstab": by_bicgstab, "jacobi": by_jacobi}
    solvers |= {"multigrid": by_multigrid, "v_cycle": by_cycles}
    yield from (case(operation, solve) for operation, solve in solvers.items())
