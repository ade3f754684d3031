"""Models with weights of eight and four bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny
from conftest import make_wafer
from flax import nnx

import models
from models import rounding
from models.layers import apply_linears
from models.quantization import Weights, quantizable
from models.quantized import Activations, QuantizedTable, QuantizedWeight, round_rows
from models.stack import scan

KINDS: list[tuple[Weights, Activations]] = [
    ("int8", None),
    ("int8", "int8"),
    ("int8", "int16"),
    ("int4", None),
]
NANO = dataclasses.replace(models.find_preset("nano"), vocab=2500, layers=2)


@functools.cache
def nano(layers: int = 2) -> models.Decoder:
    return models.Decoder(dataclasses.replace(NANO, layers=layers), rngs=nnx.Rngs(0))


def kinds(function):
    return pytest.mark.parametrize(
        ("weights", "activations"), KINDS, ids=lambda x: x if x else "float"
    )(function)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weight_of(parts, activations=None):
    arrays = jax.tree.map(jnp.asarray, parts)
    return QuantizedWeight(arrays, ("in", "out"), parts.values.ndim > 2, activations)


def compiled(model, tokens, options):
    graph, state = nnx.split(model)
    program = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    return program.lower(state, tokens).compile(compiler_options=options), state


@pytest.mark.parametrize("rounded", ["round_by_output", "round_to_int8_groups"])
def test_int8_is_off_by_half_a_step_at_most(rounded):
    weight = normal(64, 10)
    parts = getattr(rounding, rounded)(weight)
    wide = np.asarray(weight_of(parts).dequantize(jnp.float32))
    steps = np.repeat(np.atleast_2d(parts.scales), 64 // len(np.atleast_2d(parts.scales)), 0)
    # A scale of 16 bits may be 1/2048 too small, which cuts the largest values.
    assert (np.abs(wide - weight) <= 0.5 * steps + 127 * steps / 2048).all()
    assert parts.values.dtype == np.int8 and np.abs(wide - weight).max() < 0.02


def test_int4_keeps_two_values_a_byte_in_gguf_order():
    weight = normal(64, 10)
    parts = rounding.round_to_int4_groups(weight)
    assert parts.values.shape == (2, 16, 10) and parts.values.dtype == np.uint8
    assert parts.minima is not None
    wide = np.asarray(weight_of(parts).dequantize(jnp.float32))
    for i, o in ((0, 0), (15, 3), (16, 3), (31, 9), (32, 0), (63, 9)):
        group, row = divmod(i, 32)
        byte = int(parts.values[group, row % 16, o])
        number = byte >> 4 if row >= 16 else byte & 15
        assert wide[i, o] == number * np.float32(parts.scales[group, o]) + np.float32(
            parts.minima[group, o]
        )
    steps = np.repeat(parts.scales.astype(np.float32), 32, 0)
    assert (np.abs(wide - weight) <= 0.52 * steps).all()


def test_constant_and_zero_groups_round_to_themselves():
    weight = np.concatenate([np.full((32, 2), 0.5), np.zeros((32, 2))]).astype(np.float32)
    for rounded in (rounding.round_to_int4_groups, rounding.round_to_int8_groups):
        wide = weight_of(rounded(weight)).dequantize(jnp.float32)
        np.testing.assert_allclose(wide, weight, rtol=1e-3)
    np.testing.assert_allclose(
        weight_of(rounding.round_by_output(0 * weight)).dequantize(jnp.float32), 0 * weight
    )


def test_weights_beyond_float16_are_refused():
    with pytest.raises(ValueError, match="beyond what float16 scales hold"):
        rounding.round_to_int4_groups(np.full((32, 1), 1e6, np.float32))


@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_a_product_of_integers_is_exact(activations):
    x, weight = normal(3, 2, 64), normal(64, 10, seed=1)
    parts = rounding.round_by_output(weight)
    rows = round_rows(jnp.asarray(x), activations)
    got = np.asarray(weight_of(parts, activations).multiply_rounded(rows))
    integers = np.asarray(rows.terms).astype(np.int64) @ parts.values.astype(np.int64)
    scales = np.asarray(rows.scales) * parts.scales
    want = integers[0] * scales
    if activations == "int16":
        want = want + integers[1] / 254 * scales
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # What the rounding of the rows alone loses.
    exact = x @ np.asarray(weight_of(parts).dequantize(jnp.float32))
    assert np.abs(got - exact).max() < {"int8": 0.2, "int16": 1e-3}[activations]


def test_rows_of_zeros_stay_zero_and_nan_stays_in_its_row():
    x = jnp.asarray(normal(4, 1, 64)).at[1].set(0).at[2, 0, 5].set(jnp.nan)
    weight = weight_of(rounding.round_by_output(normal(64, 10)), "int8")
    out = np.asarray(weight.multiply_rounded(round_rows(x, "int8")))
    assert (out[1] == 0).all() and np.isnan(out[2]).all()
    assert np.isfinite(out[[0, 1, 3]]).all()


def test_activations_need_a_scale_for_each_output():
    with pytest.raises(ValueError, match="one scale for each output channel"):
        weight_of(rounding.round_to_int8_groups(normal(64, 10)), "int8")


@kinds
def test_products_have_the_same_bits_at_every_row_count(weights, activations, as_shipped):
    model = models.quantize(nano(), weights, activations)
    attention = next(model.layers()).attention
    features = jnp.asarray(normal(32, 1, NANO.d_model))

    def products(x):
        linears = attention.query, attention.key, attention.value
        return *apply_linears(x, *linears), model.logits(x)

    of_all = {}
    for rows in (2, 4, 8, 16, 32):
        program = jax.jit(products).lower(features[:rows]).compile(compiler_options=as_shipped)
        of_all[rows] = program(features[:rows])
    for rows, outs in of_all.items():
        for few, many in zip(outs, of_all[32], strict=True):
            np.testing.assert_array_equal(few, many[:rows])


@kinds
def test_logits_are_close_to_those_of_floats(weights, activations):
    model = models.quantize(nano(), weights, activations)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, NANO.vocab, (2, 9)), jnp.int32)
    run = jax.jit(lambda model, tokens: model(tokens))
    got, floats = run(model, tokens), run(nano(), tokens)
    most = {"int8": 0.03, "int4": 0.15}[weights]
    assert np.abs(got - floats).max() < most * np.abs(floats).max()


@kinds
def test_temporaries_do_not_grow_with_layers(weights, activations, as_shipped):
    tokens = jnp.zeros((2, 1), jnp.int32)
    sizes = []
    for layers in (3, 12):
        model = models.quantize(nano(layers), weights, activations)
        program, _ = compiled(model, tokens, as_shipped)
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] - sizes[0] < 20_000  # one weight of one layer is 65,536 bytes or more


@kinds
def test_text_is_that_of_the_logits(weights, activations):
    model = models.quantize(nano(), weights, activations)
    prompt = jnp.asarray([[5, 9, 2]])
    text = models.generate(model, prompt, max_new_tokens=3)
    for length in (3, 4, 5):
        logits = jax.jit(lambda m, t: m(t))(model, text[:, :length])
        assert int(text[0, length]) == int(jnp.argmax(logits[0, -1]))


def test_a_token_outside_the_vocabulary_gives_nan():
    table = models.quantize(nano(), "int8").embedding
    assert isinstance(table, QuantizedTable)
    rows = np.asarray(table.rows(jnp.asarray([[0, -1, NANO.vocab, NANO.vocab - 1]]), jnp.float32))
    assert np.isnan(rows[0, 1:3]).all() and np.isfinite(rows[0, [0, 3]]).all()


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_every_family(family, tmp_path):
    folder = tiny.make(tmp_path / "a", tiny.CONFIGS[family])
    tokens = jnp.asarray(tiny.tokens())
    floats = models.load(folder)
    names = {path for path, _ in quantizable(nnx.state(floats))}
    want = np.asarray(floats(tokens))
    for weights, activations in KINDS:
        model = models.load(folder, weights=weights, activations=activations)
        left = {path for path, _ in quantizable(nnx.state(model))}
        assert names and not left, "a weight of a product stayed in floats"
        got = np.asarray(jax.jit(lambda m, t: m(t))(model, tokens))
        off = np.abs(got - want).mean() / np.abs(want).mean()
        assert off < {"int8": 0.1, "int4": 0.5}[weights], (weights, activations)
        same = models.quantize(floats, weights, activations)
        for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, same)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("grid", ["2x2", "3x3", "virtual-2x4"])
@kinds
def test_on_a_wafer(grid, weights, activations):
    model = models.quantize(nano(), weights, activations)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, NANO.vocab, (2, 6)), jnp.int32)
    want = np.asarray(model(tokens))
    with make_wafer(grid):
        laid_out = models.quantize(nano(), weights, activations)
        got = np.asarray(jax.jit(lambda m, t: m(t))(laid_out, tokens))
    if grid == "2x2":
        query = laid_out.stages[0].blocks[0].attention.query.weight
        assert len({str(shard.index) for shard in query.values[...].addressable_shards}) == 4
    # With rounded activations a difference in the last bit may round another way.
    np.testing.assert_allclose(got, want, atol=2e-2 if activations == "int8" else 2e-3)


def test_what_is_refused(tmp_path):
    refused: list[tuple[dict[str, Any], str]] = [
        ({"weights": "int2"}, "weights='int2' is not one of 'int8', 'int4', 'stored'"),
        ({"weights": "int4", "activations": "int8"}, "goes with weights='int8', not 'int4'"),
        ({"weights": "int8", "activations": "int4"}, "activations='int4' is not one of"),
        ({"weights": "stored"}, "'stored' is for load"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            models.quantize(nano(), **arguments)
    with pytest.raises(ValueError, match="activations='int8' needs weights='int8'"):
        models.load(tmp_path, activations="int8")
    with pytest.raises(ValueError, match="save: the model's weights are quantized"):
        models.save(models.quantize(nano(), "int8"), tmp_path / "b")
    with pytest.raises(ValueError, match="quantize: the model's weights are quantized already"):
        models.quantize(models.quantize(nano(), "int8"), "int4")


def test_layers_scan_with_their_own_scales():
    model = models.quantize(nano(), "int4")

    def step(period, carry):
        weight = period.blocks[0].attention.query.weight
        return carry, weight.dequantize(jnp.float32)

    _, widened = scan(model.stages[0], step, jnp.zeros(()), remat=False)
    floats = nano().stages[0].blocks[0].attention.query
    assert floats.weight.axes[-2:] == ("in", "out")
    np.testing.assert_allclose(widened, floats.weight[...], atol=0.01)
