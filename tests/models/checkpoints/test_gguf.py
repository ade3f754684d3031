"""GGUF files against the Hugging Face checkpoints that they were made from."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

gguf = pytest.importorskip("gguf")

from gguf_checkpoints import (  # noqa: E402
    gguf_names,
    interleave_halves,
    read_all,
    size_fields,
    write_gguf,
)

import models  # noqa: E402
from models.__main__ import main  # noqa: E402
from models.checkpoints.gguf import GGUF  # noqa: E402
from models.config import RopeScaling  # noqa: E402
from models.rope import yarn_attention_factor  # noqa: E402
from models.text.reading import load_tokenizer  # noqa: E402

LLAMA = tiny.CONFIGS["llama3"] | {"rope_scaling": None}


def llama_file(folder, file, quantized=None, scale=None, more=None):
    values = gguf_names(read_all(folder))
    for name in values:
        for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
            if part in name:
                values[name] = interleave_halves(values[name], heads)
    if scale is not None:
        values["rope_freqs.weight"] = scale
    return write_gguf(file, "llama", size_fields("llama", LLAMA) | (more or {}), values, quantized)


def same(a, b, **tolerance):
    for x, y in zip(*(jax.tree.leaves(nnx.state(m)) for m in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance or {"rtol": 0})


def test_a_llama_file_equals_its_checkpoint(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    model = models.load(llama_file(folder, tmp_path / "a.gguf"))
    same(model, models.load(folder))
    with_wafer = models.load(tmp_path / "a.gguf", stacked=False)
    assert len(with_wafer.stages) == 3 and not with_wafer.config.stacked


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16"])
def test_quantized_files_are_dequantized(kind, tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    quantized = gguf.GGMLQuantizationType[kind]
    model = models.load(llama_file(folder, tmp_path / "a.gguf", quantized))
    same(model, models.load(folder), atol={"Q": 0.06, "F": 1e-3, "B": 1e-2}[kind[0]])


def test_llama_3s_scaling_is_recovered_from_its_frequencies(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    plain = models.load(folder).config
    scaled = tiny.CONFIGS["llama3"]["rope_scaling"] | {"original_max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": scaled}))
    config = models.load(folder).config
    from models.rope import frequencies

    divisors = frequencies(plain) / frequencies(config)
    file = llama_file(folder, tmp_path / "a.gguf", scale=divisors)
    assert models.load(file).config.rope_scaling == config.rope_scaling
    file = llama_file(folder, tmp_path / "b.gguf", scale=divisors + 0.5)
    with pytest.raises(ValueError, match="rope_freqs.weight follows no rule"):
        models.load(file)


def test_qwen3_moe_and_gpt2(tmp_path):
    fields = tiny.CONFIGS["qwen3-moe"] | {"mlp_only_layers": []}
    folder = tiny.make(tmp_path / "moe", fields)
    values = read_all(folder)
    experts = {n: v for n, v in values.items() if ".experts." in n}
    renamed = gguf_names({n: v for n, v in values.items() if n not in experts})
    for layer in range(3):
        for part in ("gate", "up", "down"):
            renamed[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack(
                [
                    experts[f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"]
                    for e in range(8)
                ]
            )
    more: dict[str, object] = {"qwen3moe.expert_count": 8, "qwen3moe.expert_used_count": 3}
    more |= {"qwen3moe.expert_feed_forward_length": 48, "qwen3moe.rope.freq_base": 1e6}
    file = write_gguf(
        tmp_path / "moe.gguf", "qwen3moe", size_fields("qwen3moe", fields) | more, renamed
    )
    same(models.load(file), models.load(folder))

    fields = tiny.CONFIGS["cerebras-gpt"] | {"activation_function": "gelu_new"}
    folder = tiny.make(tmp_path / "gpt", fields)
    names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"}
    names |= {"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    renamed = {}
    for name, value in read_all(folder).items():
        root, _, end = name.removeprefix("transformer.").rpartition(".")
        inner = root.split(".", 2)[2] if root.startswith("h.") else root
        value = value.T if inner in names and value.ndim == 2 else value
        place = top.get(root) or f"blk.{root.split('.')[1]}.{names[inner]}"
        renamed[f"{place}.{end}"] = value
    more = {"context_length": 64, "embedding_length": 64, "block_count": 3}
    more |= {"feed_forward_length": 80, "attention.head_count": 4}
    file = write_gguf(
        tmp_path / "g.gguf",
        "gpt2",
        {f"gpt2.{key}": value for key, value in more.items()},
        renamed,
    )
    same(models.load(file), models.load(folder))


def test_gpt_oss(tmp_path):
    fields = tiny.CONFIGS["gpt-oss"]
    folder = tiny.make(tmp_path / "a", fields)
    values, renamed = read_all(folder), dict[str, np.ndarray]()
    for name, value in values.items():
        if ".experts." not in name and ".sinks" not in name:
            renamed |= gguf_names({name: value})
            continue
        root = f"blk.{name.split('.')[2]}"
        if name.endswith("sinks"):
            renamed[f"{root}.attn_sinks.weight"] = value
        elif "gate_up" in name:
            end = "bias" if name.endswith("bias") else "weight"
            for i, part in enumerate(("gate", "up")):
                half = value[..., i::2]
                half = half.swapaxes(1, 2) if end == "weight" else half
                renamed[f"{root}.ffn_{part}_exps.{end}"] = half
        elif name.endswith("bias"):
            renamed[f"{root}.ffn_down_exps.bias"] = value
        else:
            renamed[f"{root}.ffn_down_exps.weight"] = value.swapaxes(1, 2)
    kind = "gpt-oss"
    more: dict[str, object] = {
        "expert_count": 6,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
    }
    more |= {"attention.sliding_window": 7, "rope.scaling.type": "yarn"}
    more |= {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    more |= {"rope.freq_base": 150_000.0}
    renamed = {n.replace("ffn_norm", "post_attention_norm"): v for n, v in renamed.items()}
    metadata = size_fields(kind, fields) | {f"{kind}.{key}": value for key, value in more.items()}
    model = models.load(write_gguf(tmp_path / "a.gguf", kind, metadata, renamed))
    want = models.load(folder)
    same(model, want)
    assert model.config.kinds == want.config.kinds
    assert model.config.rope_scaling == want.config.rope_scaling
    some = (7, 7, None, 7)
    for pattern, windows in (([True, True, False, True], some), (3, some), (0, (7,) * 4)):
        more = metadata | {f"{kind}.attention.sliding_window_pattern": pattern}
        config = models.read_config(write_gguf(tmp_path / "b.gguf", kind, more, renamed))
        assert config.windows == windows
    more = {key: value for key, value in metadata.items() if ".rope.scaling." not in key}
    config = models.read_config(write_gguf(tmp_path / "b.gguf", kind, more, renamed))
    assert config.rope_scaling is None  # not config.json's default


def test_the_tokenizer_is_in_the_file(tmp_path):
    pytest.importorskip("tokenizers")
    from models.text.bpe import byte_letters

    tokens = [*byte_letters(), "th", "the", "<|end|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3],
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{{ messages[0].content }}{{ eos_token }}",
    }
    folder = tiny.make(tmp_path / "a", LLAMA)
    file = llama_file(folder, tmp_path / "a.gguf", more=fields)
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode("the") == [257] and tokenizer.ends == (258,)
    assert tokenizer.chat([{"role": "user", "content": "the"}]) == [257, 258]
    with pytest.raises(ValueError, match="has 259 tokens, the model knows 97"):
        tokenizer.check(97)


def test_a_broken_file_is_refused(tmp_path):
    file = llama_file(tiny.make(tmp_path / "a", LLAMA), tmp_path / "a.gguf")
    data = file.read_bytes()
    for cut in (data[:3], data[:200], data[:-4000], b"\0" * 64):
        (tmp_path / "b.gguf").write_bytes(cut)
        with pytest.raises(ValueError, match="b.gguf is not GGUF, or is truncated"):
            GGUF(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", "mamba", {}, {"token_embd.weight": np.ones((3, 4))})
    with pytest.raises(ValueError, match="architecture 'mamba' is not one of llama"):
        models.load(tmp_path / "c.gguf")


def with_fields(tmp_path, more, name="b.gguf", drop=()):
    """A small Llama whose metadata have `more`, and not `drop`."""
    folder = tmp_path / "a"
    folder = folder if folder.exists() else tiny.make(folder, LLAMA)
    fields = size_fields("llama", LLAMA) | {f"llama.{key}": value for key, value in more.items()}
    fields = {key: value for key, value in fields.items() if key not in drop}
    values = gguf_names(read_all(folder))
    return write_gguf(tmp_path / name, "llama", fields, values)


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"kind": "linear", "factor": 4.0, "original_context": 64}),
        ({"rope.scale_linear": 4.0}, {"kind": "linear", "factor": 4.0, "original_context": 64}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 1.0, "rope.scale_linear": 4.0}, None),
    ],
)
def test_positions_are_stretched_as_llama_cpp_stretches_them(more, scaling, tmp_path):
    found = models.read_config(with_fields(tmp_path, more)).rope_scaling
    assert found == (scaling and RopeScaling(**scaling))


def test_every_key_of_yarn_counts(tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    yarn |= {"rope.scaling.original_context_length": 32}
    plain = RopeScaling(
        kind="yarn", factor=4.0, original_context=32, attention_factor=yarn_attention_factor(4.0)
    )

    def found(**more):
        more = {f"rope.scaling.{key}": value for key, value in more.items()}
        return models.read_config(with_fields(tmp_path, yarn | more)).rope_scaling

    assert found() == found(yarn_ext_factor=1.0, finetuned=True) == plain
    betas = found(yarn_beta_fast=16.0, yarn_beta_slow=2.0)
    assert (betas.beta_fast, betas.beta_slow) == (16, 2)
    assert found(yarn_attn_factor=1.5).attention_factor == 1.5
    np.testing.assert_allclose(
        found(attn_factor=0.5).attention_factor, plain.attention_factor * 0.5
    )
    assert found(yarn_log_multiplier=1.0).attention_factor == 1
    for key in ("yarn_ext_factor", "alpha"):
        with pytest.raises(ValueError, match=rf"b.gguf: llama.rope.scaling.{key}=0.5 is not"):
            found(**{key: 0.5})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"expert_count": 8}, "expert_count=8 but experts of llama are not supported"),
        ({"attention.scale": 0.5}, r"attention.scale=0.5 is not 1 / sqrt\(size of a head\)"),
        ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv=8.0 is not supported, only 0"),
        ({"attention.causal": False}, "attention.causal=False is not supported, only True"),
        ({"attention.sliding_window": 16}, "sliding_window=16 but windows of llama"),
        ({"attention.value_length": 8}, "attention.value_length=8 but a head has 16"),
        ({"rope.dimension_count": 8}, "rope.dimension_count=8 but a head has 16"),
        ({"rope.scaling.type": "longrope"}, "type='longrope' is not one of"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor=2.0 is not supported for type 'linear'"),
        ({"rope.scaling.factor": float("nan")}, "factor=nan is not a finite number"),
        ({"rope.freq_base": 1.0}, "freq_base=1.0 is not above 1"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1e-30}, "factor=1e-30 is below 1"),
        ({"rope.scale_linear": 0.5}, "scale_linear=0.5 is below 1"),
        ({"rope.freq_base": 0.0}, "freq_base=0.0 is not a finite number above 0"),
        ({"logit_scale": 2.0}, "logit_scale=2.0 is not supported, only 0 or 1"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"pooling_type": 3}, "pooling_type=3 is not supported"),
        ({"a_new_key": 1}, "llama.a_new_key=1 is not known here"),
        ({"block_count": 10**7}, "block_count=10000000 but there are tensors of 3 layers"),
        ({"block_count": "3"}, "block_count='3' is not a whole number"),
        ({"vocab_size": 96}, "vocab_size=96 but 'token_embd.weight' has 97 rows"),
        ({"attention.head_count": [4, 2, 4]}, "head_count=.* differs from layer to layer"),
        ({"attention.head_count": 0}, "head_count=0 is not a whole number from 1"),
        ({"embedding_length": 65}, "embedding_length=65 but 'token_embd.weight' has 64 columns"),
        (
            {"feed_forward_length": 97},
            r"the metadata ask for .* \(llama.feed_forward_length=97\)",
        ),
        (
            {"attention.layer_norm_rms_epsilon": float("nan")},
            "layer_norm_rms_epsilon=nan is not a finite number above 0",
        ),
    ],
)
def test_refuses_what_it_does_not_compute(more, message, tmp_path):
    file = with_fields(tmp_path, more)
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"b\.gguf.*{message}"):
        models.load(file)
    assert time.process_time() - began < 2


def test_harmless_keys_change_nothing(tmp_path):
    plain = models.read_config(with_fields(tmp_path, {}, "plain.gguf"))
    more: dict[str, Any] = {
        "attention.causal": True,
        "logit_scale": 1.0,
        "expert_count": 0,
        "vocab_size": 97,
    }
    more |= {"attention.scale": 0.25, "rope.dimension_count": 16, "attention.sliding_window": 4096}
    more |= {"attention.head_count_kv": [2, 2, 2], "tensor_data_layout": "Meta AI original pth"}
    assert models.read_config(with_fields(tmp_path, more)) == plain
    assert plain.norm_eps == 1e-6  # not float32's 9.99999997e-07
    with pytest.raises(ValueError, match="have no llama.attention.layer_norm_rms_epsilon"):
        drop = ("llama.attention.layer_norm_rms_epsilon",)
        models.read_config(with_fields(tmp_path, {}, drop=drop))


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix"])
def test_a_file_that_holds_no_model_is_refused(kind, tmp_path):
    file = write_gguf(tmp_path / "b.gguf", "llama", {"general.type": kind}, {})
    for read in (models.load, load_tokenizer):
        with pytest.raises(ValueError, match=f"b.gguf: general.type='{kind}' is no language model"):
            read(file)


def split(file, count, first_has_tensors=True):
    """Writes a GGUF file as `count` files, as llama.cpp's gguf-split does."""
    reader, parts = gguf.GGUFReader(file), []
    for part in range(count):
        name = file.with_name(f"{file.stem}-{part + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(name, "llama")
        if part == 0:
            for key, field in reader.fields.items():
                if not key.startswith(("GGUF.", "general.architecture")):
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        tensors = reader.tensors[part::count]
        if not first_has_tensors:
            tensors = reader.tensors[part - 1 :: count - 1] if part else []
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(name)
    return parts


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
    folder = tiny.make(tmp_path / "a", LLAMA)
    first, second, third = split(llama_file(folder, tmp_path / "a.gguf"), 3)
    same(models.load(first), models.load(folder))
    other = llama_file(folder, tmp_path / "other.gguf")
    same(models.load(split(other, 3, first_has_tensors=False)[0]), models.load(folder))
    for read in (models.load, load_tokenizer):
        with pytest.raises(ValueError, match=f"is part 2 of 3; give {first.name}, which has"):
            read(second)
    third.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(ValueError, match=f"{third.name} is missing, part 3 of 3"):
        models.load(first)
    first.rename(tmp_path / "whole.gguf")
    with pytest.raises(ValueError, match=r"split.count=3 but .* not named NAME-00001-of-00003"):
        models.load(tmp_path / "whole.gguf")


def test_a_file_written_anew_is_read_anew(tmp_path):
    """Of the same size, and within one tick of the file system's clock."""
    file = with_fields(tmp_path, {"context_length": 128})
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    assert models.read_config(file).context == 128
    other = with_fields(tmp_path, {"context_length": 256}, "other.gguf")
    os.utime(other, ns=times)
    opened = GGUF(file)
    first = opened.read("model.norm.weight", (slice(0, 64),))
    os.replace(other, file)
    assert models.read_config(file).context == 256
    file.write_bytes(bytes(file.stat().st_size))
    file.unlink()
    np.testing.assert_array_equal(opened.read("model.norm.weight", (slice(0, 64),)), first)


SMOLLM2 = pathlib.Path(os.environ.get("SMOLLM2_GGUF", "/nowhere"))


@pytest.mark.skipif(not SMOLLM2.exists(), reason="SMOLLM2_GGUF names no file")
def test_smollm2_knows_the_capital_of_france(capsys):
    command = ["generate", "--model", str(SMOLLM2), "--max-new-tokens", "8"]
    assert main([*command, "--prompt", "The capital of France is"]) == 0
    assert capsys.readouterr().out.startswith(" Paris.")
    assert main([*command, "--chat", "--prompt", "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out
