"""Without a wafer, or on one PE, an operation compiles to the plain program: it costs nothing."""

import collections
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import wsekern as wk

ONE = wk.Wafer.devices(1, 1)


@pytest.fixture(autouse=True)
def as_a_user_writes():
    with jax.numpy_rank_promotion("allow"):
        yield


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Case(NamedTuple):
    operation: Callable[..., Any]  # of its operands and `wafer=`
    plain: Callable[..., Any]
    operands: tuple


# Norms keep only their input for the backward pass, which computes the rest again.
@functools.partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x, scale):
    mean = jnp.sum(x * x, -1, keepdims=True) / x.shape[-1]
    return x * jax.lax.rsqrt(mean + 1e-6) * scale


@functools.partial(jax.checkpoint, prevent_cse=False)
def layer_norm(x, scale, bias):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def rotary(x):
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1]).astype(jnp.float32).reshape(1, -1, 1, 1) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def embedding(tokens, table):
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def cross_entropy(logits, labels):
    labels = jnp.where(labels < 0, logits.shape[-1], labels)
    mine = jnp.take_along_axis(logits, labels[..., None], -1, mode="fill", fill_value=jnp.nan)
    return jax.nn.logsumexp(logits, -1) - mine[..., 0]


A, B = spec(2, 8, 16), spec(16, 24)
Q, KV = spec(1, 8, 4, 16), spec(1, 8, 2, 16)
ROW = spec(16)
attention = jax.nn.dot_product_attention
CASES = {
    "matmul": Case(wk.matmul, jnp.matmul, (A, B)),
    "attention": Case(wk.attention, attention, (Q, KV, KV)),
    "causal attention": Case(
        lambda *qkv, wafer: wk.attention(*qkv, causal=True, scale=0.3, wafer=wafer),
        lambda *qkv: attention(*qkv, is_causal=True, scale=0.3),
        (Q, KV, KV),
    ),
    "attention in a window": Case(
        lambda *qkv, wafer: wk.attention(*qkv, causal=True, window=3, wafer=wafer),
        lambda *qkv: attention(*qkv, is_causal=True, local_window_size=(2, 0)),
        (Q, KV, KV),
    ),
    "attention in segments": Case(
        lambda q, k, v, ids, wafer: wk.attention(q, k, v, segment_ids=ids, wafer=wafer),
        lambda q, k, v, ids: attention(q, k, v, mask=(ids[:, :, None] == ids[:, None, :])[:, None]),
        (Q, KV, KV, spec(1, 8, dtype=jnp.int32)),
    ),
    "gemv": Case(wk.gemv, jnp.matmul, (A, B)),
    "matmul by a transpose": Case(
        lambda a, b, wafer: wk.matmul(a, b, transpose_b=True, wafer=wafer),
        lambda a, b: jnp.matmul(a, b.mT),
        (A, spec(24, 16)),
    ),
    "matmul of a transpose": Case(
        lambda a, b, wafer: wk.matmul(a, b, transpose_a=True, wafer=wafer),
        lambda a, b: jnp.matmul(a.mT, b),
        (spec(16, 8), B),
    ),
    "matmul with an epilogue": Case(
        lambda a, b, bias, wafer: wk.matmul(a, b, bias=bias, activation="silu", wafer=wafer),
        lambda a, b, bias: jax.nn.silu(jnp.matmul(a, b) + bias),
        (A, B, spec(24)),
    ),
    "rms_norm": Case(wk.rms_norm, rms_norm, (A, ROW)),
    "layer_norm": Case(wk.layer_norm, layer_norm, (A, ROW, ROW)),
    "rotary": Case(wk.rotary, rotary, (Q,)),
    "embedding": Case(wk.embedding, embedding, (spec(2, 8, dtype=jnp.int32), B)),
    "cross_entropy": Case(wk.cross_entropy, cross_entropy, (A, spec(2, 8, dtype=jnp.int32))),
}


def optimized_program(function, operands):
    """The optimized program, without what only names and locates its parts."""
    text = jax.jit(function).lower(*operands).compile().as_text() or ""
    text = re.sub(r",? *metadata=\{[^}]*\}", "", text.partition("\n\n")[2])
    text = re.sub(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)\n.*?\n\n", "", text)
    new_names = (f"%{number}" for number in itertools.count())
    renamed: dict[str, str] = collections.defaultdict(lambda: next(new_names))
    name = r"%[\w.\-]+|[\w.\-]+(?=: [a-z]+\d*\[)"  # of an instruction, or of a parameter
    return re.sub(name, lambda match: renamed[match[0]], text)


def with_gradients(function):
    """Of operands and the result's gradient: the result, and the floating operands' gradients."""

    def call(operands, dout):
        floating = {i: x for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)}

        def of_floating(floating):
            return function(*(floating.get(i, x) for i, x in enumerate(operands)))

        out, pull = jax.vjp(of_floating, floating)
        return out, pull(dout)

    return call


@pytest.mark.parametrize("wafer", [None, ONE], ids=["no wafer", "one PE"])
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_to_the_plain_program(name, wafer):
    operation, plain, operands = CASES[name]

    def call(*operands):
        return operation(*operands, wafer=wafer)

    assert optimized_program(call, operands) == optimized_program(
        lambda *operands: plain(*operands), operands
    )


@pytest.mark.parametrize("name", CASES)
def test_its_gradient_is_the_plain_ones_program(name):
    operation, plain, operands = CASES[name]
    dout = jax.eval_shape(plain, *operands)

    def call(*operands):
        return operation(*operands, wafer=None)

    programs = [optimized_program(with_gradients(f), (operands, dout)) for f in (call, plain)]
    # Operands of a fusion may be numbered in another order; the instructions are the same.
    ours, plains = (collections.Counter(re.findall(r"= (\S+ [\w-]+)\(", p)) for p in programs)
    assert ours and ours == plains


def test_every_operation_of_the_library_is_here():
    """A new one joins the table above."""
    machines = {"A100", "H100", "H200", "WSE1", "WSE2", "WSE3"}
    machines |= {"TPU_7X", "TPU_V5E", "TPU_V5P", "TPU_V6E"}
    others = {"Wafer", "emulate_devices", "estimate", "explain_matmul", "traffic"}
    others |= {"Compilation", "compile"}
    others |= {"KVCache", "decode_attention"}  # jax.nn has no cache, and copies a plain one
    others |= {"KVPages", "paged_attention"}
    # What a stencil computes is the user's own update.
    others |= {"Receivers", "Sources", "crop", "halo_exchange", "halo_tile", "stencil"}
    others |= {"Accelerator", "Defects", "Estimate", "Explanation", "Machine", "Memory"}
    others |= {"Placement", "Traffic", "memory"}
    others |= {"fabric", "layout"}  # modules
    others |= {"roofline", "scaling", "terminal_map", "wafer_map"}  # pictures
    others |= {"stencil_tile", "check_time_step", "difference_coefficients"}
    others |= {"diffusion_limit", "wave_limit"}
    # What a solver iterates is the user's own operator.
    others |= {"Solution", "bicgstab", "cg", "jacobi", "multigrid", "v_cycle"}
    # Plain jnp has no sparse product: its loop over experts multiplies every token by each.
    others |= {"experts", "load_balance_loss"}
    covered = {word for name in CASES for word in name.split() if word in wk.__all__}
    assert set(wk.__all__) - machines - others == covered
