"""Weights that keep the blocks of a GGUF file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

gguf = pytest.importorskip("gguf")

from gguf_checkpoints import gguf_names, interleave_halves, read_all, size_fields, write_gguf  # noqa: E402

import models  # noqa: E402
from models.checkpoints.gguf_blocks import KINDS, join, read_blocks  # noqa: E402
from models.quantized import QuantizedTable, QuantizedWeight  # noqa: E402

LLAMA = tiny.CONFIGS["llama3"] | {"rope_scaling": None}
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}


def quantize(weight, kind):
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


def mixed_file(folder, file, kind_of):
    """A llama file; `kind_of(name)` is the type of each matrix."""
    values = gguf_names(read_all(folder))
    for name, value in values.items():
        for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
            if part in name:
                values[name] = interleave_halves(value, heads)

    def raw(name):
        return gguf.GGMLQuantizationType[kind_of(name)]

    return write_gguf(file, "llama", size_fields("llama", LLAMA), values, raw)


def linears(model):
    block = model.stages[0].blocks[0]
    attention, feed_forward = block.attention, block.feed_forward
    return {
        **{n: getattr(attention, n) for n in ("query", "key", "value", "out")},
        **{n: getattr(feed_forward, n) for n in ("gate", "up", "down")},
    }


def widened(weight):
    """A weight as [layers, in, out], or a table."""
    if isinstance(weight, QuantizedWeight | QuantizedTable):
        return np.asarray(weight.dequantize(jnp.float32))
    array = np.asarray(weight[...])
    return array.swapaxes(-1, -2) if weight.axes[-2:] == ("out", "in") else array


def assert_exact(file):
    """`weights="stored"` holds just the numbers that are read without it."""
    stored, floats = models.load(file, weights="stored"), models.load(file)
    for name, linear in linears(stored).items():
        np.testing.assert_array_equal(
            widened(linear.weight), widened(linears(floats)[name].weight), err_msg=name
        )
    for name in ("embedding", "head"):
        table, plain = getattr(stored, name), getattr(floats, name)
        np.testing.assert_array_equal(widened(table), widened(plain), err_msg=name)
    return stored


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_read_as_gguf_dequantizes_them(kind):
    weight = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    rows = quantize(weight, kind)
    layout = KINDS[TYPES[kind]]
    values, scales, minima = read_blocks(rows, layout, join([layout]))
    if values.dtype == np.uint8:
        offset = 0 if layout.minima else 8
        values = np.concatenate([values & 15, values >> 4], -1).astype(np.int8) - offset
    wide = values * scales[..., None].astype(np.float32)
    wide = wide if minima is None else wide + minima[..., None].astype(np.float32)
    want = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(wide.reshape(5, 96), want)


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_one_type_is_kept_exactly(kind, tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    model = assert_exact(mixed_file(folder, tmp_path / "a.gguf", lambda name: kind))
    values = linears(model)["query"].weight.values[...]
    packed = kind.startswith("Q4")
    assert values.dtype == (jnp.uint8 if packed else jnp.int8)
    assert values.shape == (3, 2, 16 if packed else 32, 64)


@pytest.mark.parametrize("types", [("Q4_0", "Q4_1"), ("Q4_0", "Q8_0"), ("Q4_1", "Q5_0", "Q8_0")])
def test_layers_of_several_types_are_kept_exactly(types, tmp_path):
    def kind_of(name):
        layer = int(name.split(".")[1]) if name.startswith("blk") else 0
        return types[layer % len(types)]

    folder = tiny.make(tmp_path / "a", LLAMA)
    model = assert_exact(mixed_file(folder, tmp_path / "a.gguf", kind_of))
    four_bits = all(kind.startswith("Q4") for kind in types)
    values = linears(model)["query"].weight.values[...]
    assert values.dtype == (jnp.uint8 if four_bits else jnp.int8)


def test_floats_stay_floats(tmp_path):
    def kind_of(name):
        return "F32" if "ffn_down" in name else "F16" if "ffn_up" in name else "Q8_0"

    folder = tiny.make(tmp_path / "b", LLAMA)
    model = assert_exact(mixed_file(folder, tmp_path / "b.gguf", kind_of))
    assert isinstance(linears(model)["down"].weight, nnx.Param)
    assert isinstance(linears(model)["up"].weight, nnx.Param)
    assert isinstance(linears(model)["gate"].weight, QuantizedWeight)


def test_int4_takes_a_files_blocks_of_four_bits(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    file = mixed_file(folder, tmp_path / "a.gguf", lambda name: "Q4_1")
    model, floats = models.load(file, weights="int4"), models.load(file)
    for name, linear in linears(model).items():
        np.testing.assert_array_equal(
            widened(linear.weight), widened(linears(floats)[name].weight), err_msg=name
        )


def test_logits_are_those_of_the_same_numbers_in_floats(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    file = mixed_file(folder, tmp_path / "a.gguf", lambda name: "Q4_1")
    run = jax.jit(lambda m, t: m(t))
    tokens = jnp.asarray(tiny.tokens())
    stored, floats = (models.load(file, weights=w) for w in ("stored", None))
    np.testing.assert_allclose(run(stored, tokens), run(floats, tokens), atol=1e-4)


def test_gpt2_fuses_and_transposes(tmp_path):
    folder = tiny.make(tmp_path / "a", tiny.CONFIGS["gpt2"])
    names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"}
    names |= {"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    values = {}
    for name, value in read_all(folder).items():
        root, _, end = name.removeprefix("transformer.").rpartition(".")
        if root in top:
            values[f"{top[root]}.{end}"] = value
            continue
        _, layer, rest = root.split(".", 2)
        value = value.T if end == "weight" and value.ndim == 2 else value
        values[f"blk.{layer}.{names[rest]}.{end}"] = value
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 3}
    sizes |= {"feed_forward_length": 256, "attention.head_count": 4}
    fields: dict[str, float] = {f"gpt2.{key}": value for key, value in sizes.items()}
    fields["gpt2.attention.layer_norm_epsilon"] = 1e-5
    file = write_gguf(tmp_path / "a.gguf", "gpt2", fields, values, gguf.GGMLQuantizationType.Q4_0)
    stored, floats = models.load(file, weights="stored"), models.load(file)
    for part in ("query", "key", "value", "out"):
        got, want = (getattr(m.stages[0].blocks[0].attention, part) for m in (stored, floats))
        np.testing.assert_array_equal(widened(got.weight), widened(want.weight), err_msg=part)
    run = functools.partial(jax.jit(lambda m, t: m(t)), t=jnp.asarray(tiny.tokens()))
    np.testing.assert_allclose(run(stored), run(floats), atol=1e-3)
