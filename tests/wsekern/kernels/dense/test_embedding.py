"""Lookup in a split table against a one-hot product, and its gradient."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk

# Whichever is less moves along y: the table or the tokens.
SHAPES = {  # tokens, table
    "few words": ((2, 16), (8, 8)),
    "few words, padded": ((3, 21), (5, 7)),
    "many words": ((2, 4), (64, 8)),
    "many words, padded": ((3, 5), (67, 7)),
}
MORE_SHAPES = {
    "few words, tokens alone": ((21,), (5, 7)),
    "many words, tokens alone": ((5,), (67, 7)),
    "two leading dimensions": ((3, 2, 5), (9, 7)),
    "smaller than the grid": ((1, 1), (1, 1)),
}


def for_shapes(shapes):
    return pytest.mark.parametrize("shapes", shapes.values(), ids=shapes)


def operands(shapes):
    """Numbers whose sums are exact in float32, but not in bfloat16."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shapes[1][0], shapes[0], np.int32)
    return tokens, rng.integers(-99, 100, shapes[1]).astype(np.float32)


def douts(tokens, table):
    shape = (*tokens.shape, table.shape[1])
    return np.random.default_rng(1).integers(-99, 100, shape).astype(np.float32)


def plain(tokens, table):
    return np.einsum("...v,vd->...d", tokens[..., None] == np.arange(len(table)), table)


def plain_gradient(tokens, table, dout):
    gradient = np.zeros(table.shape, np.float32)
    np.add.at(gradient, tokens, dout)
    return gradient


def lookup(wafer):
    return functools.partial(wk.embedding, wafer=wafer)


def with_gradient(run):
    @jax.jit
    def call(tokens, table, dout):
        rows, pullback = jax.vjp(lambda table: run(tokens, table), table)
        return rows, *pullback(dout)

    return call


@for_shapes(SHAPES)
def test_equals_the_plain_lookup(wafer, shapes):
    tokens, table = operands(shapes)
    rows = jax.jit(lookup(wafer))(tokens, table)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, plain(tokens, table))


@for_shapes({name: SHAPES[name] for name in SHAPES if "padded" in name} | MORE_SHAPES)
def test_results_and_gradients_of_any_shape(full_wafer, shapes):
    tokens, table = operands(shapes)
    dout = douts(tokens, table)
    rows, dtable = with_gradient(lookup(full_wafer))(tokens, table, dout)
    np.testing.assert_array_equal(rows, plain(tokens, table))
    np.testing.assert_array_equal(dtable, plain_gradient(tokens, table, dout))


@pytest.mark.parametrize("shapes", [((3, 99), (2, 7)), ((3, 99), (900, 7))], ids=["few", "many"])
def test_bfloat16_gradients_of_repeated_tokens_are_summed_in_float32(full_wafer, shapes):
    tokens, table = operands(shapes)
    tokens = tokens % 2
    dout = douts(tokens, table)
    run = with_gradient(lookup(full_wafer))
    rows, dtable = run(tokens, table.astype(jnp.bfloat16), dout.astype(jnp.bfloat16))
    assert rows.dtype == dtable.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, plain(tokens, table))
    want = plain_gradient(tokens, table, dout)
    np.testing.assert_array_equal(dtable, want.astype(jnp.bfloat16))


@for_shapes(
    {
        "few words": ((4, 99), (8, 8)),
        "many words": ((4, 99), (900, 8)),
        "many words, padded": ((3, 21), (67, 7)),
        "many words, tokens alone": ((5,), (67, 7)),
    }
)
@pytest.mark.parametrize("grid", [(2, 2, 2), (2, 4, 1), (4, 4, 1)], ids=str)
def test_the_ways_of_accelerators_give_the_same(shapes, grid, monkeypatch):
    """Each wafer looks up its share; on a square, rows are summed before they are reflected."""
    module = importlib.import_module("wsekern.kernels.dense.embedding")
    monkeypatch.setattr(module, "keeps_shares", lambda wafer: wafer.wafers > 1)
    monkeypatch.setattr(module, "on_accelerators", lambda wafer: True)
    tokens, table = operands(shapes)
    dout = douts(tokens, table)
    rows, dtable = with_gradient(lookup(wk.Wafer.devices(*grid)))(tokens, table, dout)
    np.testing.assert_array_equal(rows, plain(tokens, table))
    np.testing.assert_array_equal(dtable, plain_gradient(tokens, table, dout))


def test_an_unknown_token_is_nan_and_has_no_gradient(wafer):
    tokens, table = operands(SHAPES["many words, padded"])
    V, unknown = len(table), np.zeros(tokens.shape, bool)
    tokens[0, :5] = [-1, -V, V, V + 1, 2**31 - 1]
    unknown[0, :5] = True
    rows, dtable = with_gradient(lookup(wafer))(tokens, table, np.ones((*tokens.shape, 7), "f"))
    np.testing.assert_array_equal(np.isnan(rows), np.broadcast_to(unknown[..., None], rows.shape))
    np.testing.assert_array_equal(np.asarray(rows)[~unknown], plain(tokens, table)[~unknown])
    counts = np.bincount(tokens[~unknown], minlength=V)
    np.testing.assert_array_equal(dtable, np.broadcast_to(counts[:, None], table.shape))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_tokens_are_of_any_integer_dtype(dtype):
    tokens, table = operands(SHAPES["many words, padded"])
    rows = jax.jit(lookup(wk.Wafer.devices(2, 4)))(tokens.astype(dtype), table)
    np.testing.assert_array_equal(rows, plain(tokens, table))


@pytest.mark.parametrize(("name", "table_moves"), [("few words", True), ("many words", False)])
def test_what_is_less_moves(name, table_moves):
    tokens, table = operands(SHAPES[name])
    run = lookup(wk.Wafer.devices(2, 4))
    forward = jax.jit(run).lower(tokens, table).as_text()
    gradient = with_gradient(run).lower(tokens, table, douts(tokens, table)).as_text()
    for program in (forward, gradient):
        assert ("stablehlo.all_to_all" in program) != table_moves
        assert "stablehlo.reduce_scatter" in program


def test_no_pe_holds_the_whole_table(as_shipped):
    wafer, (B, T), (V, D) = wk.Wafer.devices(4, 4), (2, 8), (64, 16)
    operands = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=wafer.sharding(P(*spec)))
        for shape, dtype, spec in (
            ((B, T), jnp.int32, ("wafer", "y")),
            ((V, D), jnp.float32, ("x", "y")),
            ((B, T, D), jnp.float32, ("wafer", "y", "x")),
        )
    ]
    lowered = with_gradient(lookup(wafer)).lower(*operands)
    program = lowered.compile(compiler_options=as_shipped).as_text()
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"f32\[([\d,]+)\]", program)
    ]
    assert V * D // 16 in sizes
    assert max(sizes) <= V * D // 4


def test_runs_on_the_wafer_in_force():
    tokens, table = operands(SHAPES["few words, padded"])
    run = jax.jit(lambda tokens, table: wk.embedding(tokens, table))
    plainly = run(tokens, table)
    with wk.Wafer.devices(2, 4):
        assert "stablehlo.reduce_scatter" in run.lower(tokens, table).as_text()
        np.testing.assert_array_equal(run(tokens, table), plainly)


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("tokens", "table", "message"),
    [
        (np.zeros(4, int), np.ones(8, "f"), r"table is \(8,\), it must have two dimensions"),
        (np.zeros((), int), np.ones((8, 4), "f"), "tokens is a single number"),
        (np.zeros(4, "f"), np.ones((8, 4), "f"), "tokens is float32; cast it to an integer dtype"),
        (np.zeros(4, int), np.ones((8, 4), int), "table is int.*; cast it to a floating dtype"),
    ],
)
def test_refuses_what_does_not_fit(wafer, tokens, table, message):
    with pytest.raises(ValueError, match=f"^embedding: .*{message}"):
        wk.embedding(tokens, table, wafer=wafer)


@pytest.mark.parametrize("place", [None, wk.Wafer.devices(2, 4)], ids=["local", "2x4"])
def test_a_token_seen_a_thousand_times_sums_its_gradient_in_float32(place):
    def total(table):
        rows = wk.embedding(jnp.zeros((1, 1000), jnp.int32), table, wafer=place)
        return rows.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(jnp.zeros((4, 8), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(gradient[0]), 1000)


@pytest.mark.parametrize("V", [256, 300])
def test_a_vocabulary_may_be_larger_than_what_the_tokens_dtype_holds(V):
    table = np.arange(V * 4, dtype=np.float32).reshape(V, 4)
    tokens = np.array([[0, 1, 255, 44]], np.uint8)
    run = jax.jit(functools.partial(wk.embedding, wafer=wk.Wafer.devices(2, 2)))
    np.testing.assert_array_equal(run(tokens, table), table[tokens])
