"""Loading and saving checkpoints: exact both ways, and hostile files refused."""

import dataclasses
import json
import os
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

import models
from models.__main__ import main
from models.checkpoints import comparison, mxfp4, tensors
from models.checkpoints.saving import check_savable
from models.presets import PRESETS

LLAMA = tiny.CONFIGS["llama3"]


def same(a, b):
    pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (a, b)), strict=True)
    return all(x.dtype == y.dtype and (x == y).all() for x, y in pairs)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_saving_writes_what_was_loaded(name, tmp_path):
    model = models.load(tiny.make(tmp_path / "a", tiny.CONFIGS[name]))
    models.save(model, tmp_path / "b")
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert before["architectures"] == after["architectures"] and "rope_scaling" not in after
    whole = [tensors.open_folder(tmp_path / d) for d in "ab"]
    assert whole[0].shapes == whole[1].shapes
    for key, shape in whole[0].shapes.items():
        every = tuple(slice(0, n) for n in shape)
        np.testing.assert_array_equal(whole[0].read(key, every), whole[1].read(key, every))
    assert same(models.load(tmp_path / "b"), model)


def test_saving_in_several_files_with_an_index_and_back_in_one(tmp_path):
    model = models.load(tiny.make(tmp_path / "a", LLAMA))
    models.save(model, tmp_path / "b", most=60_000)
    files = sorted(f.name for f in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-")
    assert same(models.load(tmp_path / "b"), model)
    models.save(model, tmp_path / "b")
    assert [f.name for f in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]
    assert same(models.load(tmp_path / "b"), model)


def test_a_preset_is_saved_as_a_llama(tmp_path):
    config = models.find_preset("nano")
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    tokens = jnp.arange(16)[None]
    logits, reloaded = (jax.jit(lambda t, m=m: m(t))(tokens) for m in (model, again))
    np.testing.assert_allclose(logits, reloaded, atol=1e-5)


def test_biases_that_a_model_lacks_are_saved_as_zeros(tmp_path):
    """nanoGPT's configuration has none; GPT-2's config.json cannot say so."""
    config = dataclasses.replace(models.find_preset("gpt2-nano"), layers=2, vocab=65, context=16)
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert (config.biases, again.config.biases) == ((), ("qkv", "out", "mlp", "norm"))
    tokens = jnp.arange(16)[None]
    logits, reloaded = (jax.jit(lambda t, m=m: m(t))(tokens) for m in (model, again))
    np.testing.assert_allclose(logits, reloaded, atol=1e-5)


def test_what_config_json_cannot_say_is_refused():
    gpt2 = models.find_preset("gpt2-nano")
    for config in PRESETS.values():
        check_savable(config)
    with pytest.raises(ValueError, match="gpt2 checkpoint cannot say positions=rotary; it means"):
        check_savable(dataclasses.replace(gpt2, positions="rotary"))
    with pytest.raises(ValueError, match=r"llama checkpoint has no biases=\('norm',\)"):
        check_savable(dataclasses.replace(models.find_preset("nano"), biases=("norm",)))


@pytest.mark.parametrize("grid", ["2x4", "2of2x2", "virtual-4x4"])
def test_each_device_gets_its_own_part(grid, tmp_path, wafer_called):
    folder = tiny.make(tmp_path, tiny.CONFIGS["qwen3-moe"])
    wafer = wafer_called(grid)
    model = models.load(folder, wafer=wafer)
    whole = models.load(folder)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    if grid == "2x4":
        query = model.stages[0].blocks[0].attention.query.weight
        assert query[...].sharding.shard_shape(query.shape) == (1, 128 // 4, 64 // 2)


def test_dtypes(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    low = models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(low))} == {"bfloat16"}
    models.save(low, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    wide, exact = models.load(tmp_path / "b"), models.load(folder)
    assert wide.dtype == jnp.float32  # on a CPU
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (wide, exact)), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2_with_and_without_prefix_and_buffers(prefix, tmp_path):
    folder = tiny.make(tmp_path / "a", tiny.CONFIGS["gpt2"])
    source = tensors.open_folder(folder)
    renamed = {
        name if prefix else name.removeprefix("transformer."): name for name in source.shapes
    }
    arrays = {new: (source.shapes[old], np.dtype(np.float32)) for new, old in renamed.items()}
    buffer = ("transformer." if prefix else "") + "h.0.attn.bias"
    arrays[buffer] = ((1, 1, 4, 4), np.dtype(np.float32))

    def read(name):
        if name == buffer:
            return np.ones((1, 1, 4, 4), np.float32)
        return source.read(renamed[name], tuple(slice(None) for _ in arrays[name][0]))

    (tmp_path / "b").mkdir()
    tensors.write(tmp_path / "b" / "model.safetensors", arrays, read)
    (tmp_path / "b" / "config.json").write_text((folder / "config.json").read_text())
    assert same(models.load(tmp_path / "b"), models.load(folder))


def test_mxfp4_is_decoded_exactly_and_saved_decoded(tmp_path):
    fields = tiny.CONFIGS["gpt-oss"] | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    source = tensors.open_folder(tiny.make(tmp_path / "a", tiny.CONFIGS["gpt-oss"]))
    random, values = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, shape in source.shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            E, width, out = shape
            blocks = random.integers(0, 256, (E, out, width // 32, 16)).astype(np.uint8)
            scales = random.integers(118, 126, (E, out, width // 32)).astype(np.uint8)
            values |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            values[name] = source.read(name, tuple(slice(None) for _ in shape))
    arrays = {name: (v.shape, v.dtype) for name, v in values.items()}
    (tmp_path / "b").mkdir()
    tensors.write(tmp_path / "b" / "model.safetensors", arrays, values.__getitem__)
    (tmp_path / "b" / "config.json").write_text(json.dumps(fields))
    model = models.load(tmp_path / "b")
    layer = "model.layers.3.mlp.experts.gate_up_proj"
    blocks, scales = values[f"{layer}_blocks"], values[f"{layer}_scales"]
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for e, row, column in [(0, 0, 0), (5, 191, 63), (2, 17, 34)]:
        byte = int(blocks[e, row, column // 32, column % 32 // 2])
        nibble = byte >> 4 if column % 2 else byte & 15
        value = (
            table[nibble & 7]
            * (-1) ** (nibble >> 3)
            * 2.0 ** (scales[e, row, column // 32] - 127.0)
        )
        experts = model.stages[0].blocks[1].feed_forward
        got = (experts.up if row % 2 else experts.gate)[1, e, column, row // 2]
        assert float(got) == value
    models.save(model, tmp_path / "c")
    assert "quantization_config" not in json.loads((tmp_path / "c" / "config.json").read_text())
    assert same(models.load(tmp_path / "c"), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_blocks": np.zeros((2, 4, 1, 16), np.float32)}, "is float32.*must be uint8"),
        ({"x_blocks": np.zeros((2, 4, 16), np.uint8)}, r"must be uint8 \[E, out, in/32, 16\]"),
        ({"x_scales": None}, "and have 'x_scales'"),
        ({"x_scales": np.zeros((2, 4, 2), np.uint8)}, "and have 'x_scales'"),
        ({"x": np.zeros((2, 32, 4), np.float32)}, "'x_blocks' and 'x' are the same array"),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused(changes, message, tmp_path):
    right = {
        "x_blocks": np.zeros((2, 4, 1, 16), np.uint8),
        "x_scales": np.zeros((2, 4, 1), np.uint8),
    }
    values = {name: value for name, value in (right | changes).items() if value is not None}
    arrays = {name: (value.shape, value.dtype) for name, value in values.items()}
    tensors.write(tmp_path / "model.safetensors", arrays, values.__getitem__)
    with pytest.raises(ValueError, match=message):
        mxfp4.Mxfp4(tensors.open_folder(tmp_path))


def test_every_mxfp4_scale_is_exact():
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    for scale in (1, 64, 127, 190, 250):
        got = mxfp4.decode(blocks, np.full((16, 1), scale, np.uint8))
        assert got.dtype == ml_dtypes.bfloat16
        nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(16, 32)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        np.testing.assert_array_equal(got.astype(np.float64), table[nibbles] * 2.0 ** (scale - 127))


def checkpoint_with(folder, fields=LLAMA, **changes):
    """A checkpoint with some tensors replaced, or left out if the change is None."""
    source = tensors.open_folder(tiny.make(folder, fields))
    values = {
        name: source.read(name, tuple(slice(None) for _ in shape)).copy()
        for name, shape in source.shapes.items()
    }
    values = {k: v for k, v in (values | changes).items() if v is not None}
    arrays = {name: (v.shape, v.dtype) for name, v in values.items()}
    tensors.write(folder / "model.safetensors", arrays, values.__getitem__)
    return folder


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    """transformers 4 drops the file's head, 5 takes it: neither is safe to assume."""
    fields = tiny.CONFIGS["llama-biased-tied"]
    folder = tiny.make(tmp_path, fields)
    want = models.load(folder)
    embedding = tensors.open_folder(folder).read("model.embed_tokens.weight", (slice(None),)).copy()
    checkpoint_with(folder, fields, **{"lm_head.weight": embedding.astype(np.float64)})
    assert same(models.load(folder), want)
    embedding[-1, -1] += 1e-3
    for head in (embedding, embedding[:-1], embedding[:, :-1]):
        checkpoint_with(folder, fields, **{"lm_head.weight": head})
        with pytest.raises(ValueError, match="'lm_head.weight' is not 'model.embed_tokens.weight'"):
            models.load(folder)


@pytest.mark.parametrize("name", ["gpt2", "llama-biased-tied"])
def test_a_model_without_its_head_is_read(name, tmp_path):
    """LlamaModel, GPT2Model and their like: no prefix, no head; the head must be the embedding."""
    fields = tiny.CONFIGS[name] | {"tie_word_embeddings": True}
    want = models.load(tiny.make(tmp_path / "a", fields))
    source = tensors.open_folder(tmp_path / "a")
    old = {name.split(".", 1)[1]: name for name in source.shapes}
    whole = tmp_path / "b" / "model.safetensors"
    (tmp_path / "b").mkdir()
    arrays = {name: (source.shapes[old[name]], np.dtype(np.float32)) for name in old}
    tensors.write(whole, arrays, lambda name: source.read(old[name], (slice(None),)))
    bare = fields["architectures"][0].replace("ForCausalLM", "Model").replace("LMHead", "")
    (tmp_path / "b" / "config.json").write_text(json.dumps(fields | {"architectures": [bare]}))
    model = models.load(tmp_path / "b")
    assert same(model, want)
    models.save(model, tmp_path / "c")
    saved = json.loads((tmp_path / "c" / "config.json").read_text())
    assert saved["architectures"] == fields["architectures"]
    untied = fields | {"architectures": [bare], "tie_word_embeddings": False}
    (tmp_path / "b" / "config.json").write_text(json.dumps(untied))
    with pytest.raises(ValueError, match="lm_head.weight' is missing: .* without its head"):
        models.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_buffers_do_not_widen_what_is_converted(name, tmp_path):
    fields = tiny.CONFIGS[name]
    low = models.load(tiny.make(tmp_path / "a", fields), dtype=jnp.bfloat16)
    models.save(low, tmp_path / "b")
    source = tensors.open_folder(tmp_path / "b")
    buffers = {
        "llama3": "model.layers.0.self_attn.rotary_emb.inv_freq",
        "gpt2": "transformer.h.0.attn.bias",
    }
    values = {key: source.read(key, (slice(None),)).copy() for key in source.shapes}
    values[buffers[name]] = np.ones(8, np.float32)
    arrays = {key: (v.shape, v.dtype) for key, v in values.items()}
    tensors.write(tmp_path / "b" / "model.safetensors", arrays, values.__getitem__)
    assert main(["convert", "--model", str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    written = tensors.open_folder(tmp_path / "c")
    assert {dtype.name for dtype in written.dtypes.values()} == {"bfloat16"}
    assert same(models.load(tmp_path / "c", jnp.bfloat16), low)


def test_a_parameter_whose_name_ends_like_a_buffer_s_counts():
    config = models.find_preset("gpt2-124m")
    assert not comparison.is_parameter(config, "h.0.attn.bias")
    assert comparison.is_parameter(config, "transformer.h.0.attn.c_attn.bias")
    assert comparison.is_parameter(config, "transformer.lm_head.weight")
    assert not comparison.is_parameter(models.find_preset("nano"), "rotary_emb.inv_freq")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, rf"model.safetensors: '{NORM}' is missing.*\(3 layers\)"),
        ({NORM: np.ones(63, np.float32)}, rf"'{NORM}' is \(63,\), config.json asks for \(64,\)"),
        ({"extra.weight": np.ones(3, np.float32)}, "'extra.weight' is not used by the model"),
        ({NORM: np.ones(64, np.int8)}, "is int8, not one of float64"),
        ({NORM: np.ones(64, ml_dtypes.float8_e4m3fn)}, "is float8_e4m3fn, not one of float64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, tmp_path):
    folder = checkpoint_with(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM' is not one of GPT2LMHead"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq', only 'mxfp4'"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers=4, but .* are of 3 layers"),
        ({"hidden_act": "relu6"}, "hidden_act='relu6' is not one of"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not one of"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message, tmp_path):
    folder = tiny.make(tmp_path, LLAMA)
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: it has no config.json"):
        models.load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="of a GGUF file, give the path: .*x.gguf"):
        models.load(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="it is an adapter: merge it into its model"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no \*.safetensors"):
        models.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="holds pytorch_model.bin, a pickle: reading one runs"):
        models.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load(tmp_path / "nowhere" / "at" / "all")


def header(fields, data=b"", length=None):
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not safetensors, or is truncated"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS; fetch"),
        (header({}, length=2**63), "its header claims 9223372036854775808"),
        (header({}, length=300), "its header claims 300"),
        (header(b"{]"), "its header is not valid"),
        (header(b"[]"), "not a JSON object"),
        (header(b'{"a": 1}'), "'a' is not described"),
        (header({"a": entry()}, b"1234"), "'a' ends at byte .* it is truncated"),
        (header({"a": entry(shape=(3,))}, b"12345678"), "12 bytes, but has 8"),
        (header({"a": entry(shape=(2**62, 4))}, b"12345678"), "'a' is F32"),
        (header({"a": entry(shape=(-2,))}, b"12345678"), r"has shape \[-2\]"),
        (header({"a": entry(dtype="Q9")}, b"12345678"), "of dtype 'Q9'"),
        (header({"a": entry(), "b": entry(offsets=(4, 12))}, b"1" * 12), "'a' and 'b' overlap"),
        (header(b'{"a": {}, "a": {}}'), "'a' stands in it twice"),
        (header({"a": entry(offsets=(8, 16))}, b"1" * 16), "8 bytes after the header are of no a"),
        (header({"a": entry()}, b"1" * 9), "its last 1 bytes are of no array"),
        (header({"a": entry(shape=(True, 2))}, b"1" * 8), r"has shape \[True, 2\]"),
        (header({"a": entry(shape=(2.0,))}, b"1" * 8), r"has shape \[2.0\]"),
        (header({"a": entry(shape=(2**64,))}, b"1" * 8), "has shape"),
        (header({"a": entry(offsets=(0, 4, 8))}, b"1" * 8), "data_offsets"),
        (header({"a": entry(offsets=(8, 0))}, b"1" * 8), "has -8"),
        (header({"a": entry(dtype=["F32"])}, b"1" * 8), "of dtype"),
        (header({"__metadata__": {"a": 1}}), "is not an object of strings"),
        (header({"__metadata__": []}), "is not an object of strings"),
        (header({}), "no tensor is in it"),
        (header(b'\xef\xbb\xbf{"a": 1}'), "is not safetensors"),
    ],
)
def test_hostile_files_are_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize("case", ["names", "more", "twice", "long", "large", "deep", "brackets"])
def test_large_hostile_headers_are_refused_at_once(case, tmp_path):
    empty = entry((0,), offsets=(0, 0))
    names = {f"model.layers.{i % 3}.{i}": empty for i in range(60_000)}
    text = json.dumps(names)
    content = {
        "names": lambda: header(names),
        "more": lambda: header(text.encode()[:-1] + b"," + text.replace("model", "m").encode()[1:]),
        "twice": lambda: header(text.encode()[:-1] + b',"model.layers.1.59998": {}}'),
        "long": lambda: header({"a": entry((1,) * 2_000_000)}, b"1" * 8),
        "large": lambda: header({"a": entry((10**4000,) * 1000)}, b"1" * 8),
        "deep": lambda: header(b'{"a":' + b"[" * 100_000),
        "brackets": lambda: header(b'{"a":[' + b"{}," * 5_000_000),
    }[case]()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert time.process_time() - began < 2
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


def test_only_regular_files_are_read(tmp_path):
    folder = tiny.make(tmp_path, LLAMA)
    for name in ("model.safetensors", "config.json"):
        file = folder / name
        file.rename(folder / "kept")
        os.mkfifo(file)
        with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
            models.load(folder)
        file.unlink()
        file.mkdir()
        with pytest.raises(ValueError, match=f"{name} is a folder, not a regular file"):
            models.load(folder)
        file.rmdir()
        file.symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"{name} is a device, not a regular file"):
            models.load(folder)
        file.unlink()
        (folder / "kept").rename(folder / f"the {name}")
        file.symlink_to(f"the {name}")
        models.read_config(folder)


def test_a_whole_file_goes_before_an_index_beside_it(tmp_path):
    """As in transformers: an index that an older, larger save left behind names other files."""
    folder = tiny.make(tmp_path / "a", LLAMA)
    want = models.load(folder)
    models.save(want, tmp_path / "b", most=60_000)
    for file in (tmp_path / "b").glob("model*"):
        file.rename(folder / file.name)
    later = tiny.make(folder, LLAMA, seed=1)
    assert not same(models.load(later), want)
    (folder / "model.safetensors").unlink()
    assert same(models.load(folder), want)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path):
    model = models.load(tiny.make(tmp_path / "a", LLAMA))
    models.save(model, tmp_path / "b", most=60_000)
    folder = tmp_path / "b"
    index = json.loads((folder / tensors.INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    lying = index | {"weight_map": index["weight_map"] | {name: last}}
    (folder / tensors.INDEX).write_text(json.dumps(lying))
    with pytest.raises(ValueError, match=f"{last} has no '{name}', which"):
        models.load(folder)
    (folder / last).write_bytes((folder / first).read_bytes())
    (folder / tensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"is in .*{first} and in .*{last}"):
        models.load(folder)


def test_an_index_that_lies_is_refused(tmp_path):
    folder = tiny.make(tmp_path, LLAMA)
    (folder / "model.safetensors").rename(folder / "some.safetensors")
    index = folder / tensors.INDEX
    for file_of, message in [
        ({"a": "../other.safetensors"}, "is not a file beside it"),
        ({"a": "gone.safetensors"}, "gone.safetensors. is missing beside it"),
        ({"a": "some.safetensors"}, "has no 'a', which"),
        ({}, "its weight_map is empty"),
    ]:
        index.write_text(json.dumps({"weight_map": file_of}))
        with pytest.raises(ValueError, match=message):
            models.load(folder)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "base_model.model.", "language_model.", "a.module."]
)
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_module_around_the_model_is_named(name, wrapper, tmp_path):
    folder = tiny.make(tmp_path, tiny.CONFIGS[name])
    source = tensors.open_folder(folder)
    old = {wrapper + name: name for name in source.shapes}
    arrays = {new: (source.shapes[name], source.dtypes[name]) for new, name in old.items()}
    file = folder / "model.safetensors"
    tensors.write(file, arrays, lambda name: source.read(old[name], (slice(None),)))
    with pytest.raises(ValueError, match=f"their names begin with '{wrapper}'; .*save"):
        models.load(folder)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = models.load(tiny.make(tmp_path, LLAMA))
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        models.save(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
