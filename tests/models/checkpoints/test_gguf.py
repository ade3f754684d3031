"""GGUF files against the Hugging Face checkpoints that they were made from."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

gguf = pytest.importorskip("gguf")

import models  # noqa: E402
from models.__main__ import main  # noqa: E402
from models.checkpoints import tensors  # noqa: E402
from models.checkpoints.gguf import GGUF  # noqa: E402
from models.text.reading import load_tokenizer  # noqa: E402

LLAMA = tiny.CONFIGS["llama3"] | {"rope_scaling": None}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
}


def read_all(folder):
    source = tensors.open_folder(folder)
    return {n: source.read(n, tuple(slice(None) for _ in s)) for n, s in source.shapes.items()}


def write_gguf(file, kind, fields, values, quantized=None):
    """Writes a GGUF file as the llama.cpp scripts do."""
    writer = gguf.GGUFWriter(file, kind)
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            add[type(value)](key, value)
    for name, value in values.items():
        value = np.ascontiguousarray(value, np.float32)
        if quantized is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
            data = gguf.quants.quantize(value, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def interleave_halves(weight, heads):
    """The rows of queries or keys as llama files have them: a head's two halves interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def size_fields(kind, fields):
    renamed = {
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "block_count": fields["num_hidden_layers"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": fields["num_attention_heads"],
        "attention.head_count_kv": fields["num_key_value_heads"],
        "attention.key_length": fields.get("head_dim", 16),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": float(fields.get("rope_theta", 10_000.0)),
    }
    return {f"{kind}.{key}": value for key, value in renamed.items()}


def gguf_names(values):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    renamed = {}
    for name, value in values.items():
        root, _, end = name.rpartition(".")
        if root in top:
            renamed[f"{top[root]}.{end}"] = value
        else:
            _, _, layer, rest = root.split(".", 3)
            renamed[f"blk.{layer}.{NAMES[rest]}.{end}"] = value
    return renamed


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


def test_the_tokenizer_is_in_the_file(tmp_path):
    pytest.importorskip("tokenizers")
    from models.text.bpe import _letters

    tokens = [*_letters(), "th", "the", "<|end|>"]
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


SMOLLM2 = pathlib.Path(os.environ.get("SMOLLM2_GGUF", "/nowhere"))


@pytest.mark.skipif(not SMOLLM2.exists(), reason="SMOLLM2_GGUF names no file")
def test_smollm2_knows_the_capital_of_france(capsys):
    command = ["generate", "--model", str(SMOLLM2), "--max-new-tokens", "8"]
    assert main([*command, "--prompt", "The capital of France is"]) == 0
    assert capsys.readouterr().out.startswith(" Paris.")
    assert main([*command, "--chat", "--prompt", "What is the capital of France?"]) == 0
    assert "Paris" in capsys.readouterr().out
