"""What the metadata of a GGUF file say of its model, as the fields of config.json.

Every key of the model's architecture is read, or is known to change nothing at its value; any other
is refused by name. The keys are listed in `src/llama-arch.cpp` of llama.cpp; what its converter
writes in them, in `conversion/`.
"""

import math
from typing import Any

import numpy as np

from models.checkpoints.gguf_header import Header, Tensor
from models.checkpoints.json_file import shown
from models.config import RopeScaling
from models.rope import stretch, yarn_attention_factor

# GGUF's architecture -> DecoderConfig.family
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
}
# Keys that are read.
_READ = (
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
)
_READ_GPT2 = ("attention.layer_norm_epsilon",)
_READ_ROTARY = (
    *("attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("attention.scale", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
    *("rope.scaling.original_context_length", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast"),
    *("rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count"),
    *("expert_feed_forward_length", "expert_weights_norm"),
)
# Keys that change nothing here, whatever their value: notes, and numbers of other architectures.
_HARMLESS = {
    *("attention.group_norm_epsilon", "attention.group_norm_groups"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
    "rope.scaling.finetuned",
}
# Keys that change nothing at these values alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "hidden_activation": ("silu",),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
_GATING = {"gpt-oss": (0, 3)}  # expert_gating_func: 1 is a softmax of all, 3 of the chosen
# Kinds of files that are no models -> what to do with one
_NO_MODELS = {
    "adapter": "merge it into its model with llama.cpp's `llama-export-lora`",
    "mmproj": "it reads images for a language model; give the model's own file",
    "clip": "it reads images for a language model; give the model's own file",
    "imatrix": "it is what a model is quantized with; give the model's own file",
    "controlvector": "it steers a model; give the model's own file",
}


def check_is_model(header: Header) -> None:
    """Raises ValueError if a file is an adapter or the like, or has keys of the wrong model."""
    kind = header.text("general.type", "model")
    architecture = header.text("general.architecture")
    for name, value in (("general.type", kind), ("general.architecture", architecture)):
        if value in _NO_MODELS:
            raise header.error(name, f"is no language model: {_NO_MODELS[value]}")
    if kind not in ("model", "vocab"):
        raise header.error("general.type", "is not 'model'")


def fields_of(header: Header, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of config.json.

    Args:
      header: of the file, or of the first part of a split one.
      tensors: of all parts.

    Raises:
      ValueError: the architecture is unknown, a value is missing or out of range, or a value asks
        for what the families here do not have.
    """
    check_is_model(header)
    kind = header.text("general.architecture")
    if kind is None:
        raise header.error("general.architecture", "")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{header.file}: architecture {shown(kind)} is not one of {', '.join(ARCHITECTURES)}"
        )
    _check_keys(header, kind)
    if "token_embd.weight" not in tensors:
        raise ValueError(
            f"{header.file} has no tensor 'token_embd.weight'; it holds no whole model"
        )
    vocab, width = (*tensors["token_embd.weight"].shape, 0)[:2]
    if header.integer(f"{kind}.embedding_length", least=1) != width:
        raise header.error(
            f"{kind}.embedding_length", f"but 'token_embd.weight' has {width:,} columns"
        )
    if header.integer(f"{kind}.vocab_size", vocab) != vocab:
        raise header.error(f"{kind}.vocab_size", f"but 'token_embd.weight' has {vocab:,} rows")
    common: dict[str, Any] = {
        "model_type": ARCHITECTURES[kind],
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name in ("bos_token_id", "eos_token_id"):
        key = f"tokenizer.ggml.{name}"
        common[name] = header.integer(key, most=vocab - 1) if key in header else None
    layers = header.integer(f"{kind}.block_count", least=1)
    in_file = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(in_file) != layers:
        raise header.error(f"{kind}.block_count", f"but there are tensors of {len(in_file)} layers")
    if kind == "gpt2":
        return common | _gpt2(header, layers)
    return common | _rotary(header, tensors, kind, layers)


def _gpt2(header: Header, layers: int) -> dict[str, Any]:
    heads = header.integer("gpt2.attention.head_count", least=1)
    if header.integer("gpt2.attention.head_count_kv", heads) != heads:
        raise header.error("gpt2.attention.head_count_kv", f"but there are {heads} heads")
    width = header.integer("gpt2.embedding_length", least=1)
    if width % heads:
        raise header.error("gpt2.attention.head_count", f"does not divide embedding_length={width}")
    return {
        "n_embd": width,
        "n_inner": header.integer("gpt2.feed_forward_length", least=1),
        "n_layer": layers,
        "n_head": heads,
        "n_positions": header.integer("gpt2.context_length", least=1),
        "layer_norm_epsilon": header.number("gpt2.attention.layer_norm_epsilon", 1e-5),
    }


def _rotary(header: Header, tensors: dict[str, Tensor], kind: str, layers: int) -> dict[str, Any]:
    """The fields of Llama and of what is like it."""
    width = header.integer(f"{kind}.embedding_length", least=1)
    heads = header.integer(f"{kind}.attention.head_count", least=1)
    kv_heads = header.integer(f"{kind}.attention.head_count_kv", heads, least=1)
    if heads > width:
        raise header.error(f"{kind}.attention.head_count", f"is above embedding_length={width:,}")
    head_size = header.integer(f"{kind}.attention.key_length", width // heads, least=1)
    if heads % kv_heads:
        raise header.error(f"{kind}.attention.head_count", f"is no multiple of {kv_heads} kv heads")
    if head_size % 2:
        raise ValueError(
            f"{header.file}: a head has {head_size} features ({kind}.attention.key_length), but "
            "rotary positions need an even number"
        )
    if kind == "qwen2" and heads * head_size != width:
        raise header.error(f"{kind}.attention.head_count", f"times {head_size} is not {width}")
    for name in ("attention.value_length", "rope.dimension_count"):
        if header.integer(f"{kind}.{name}", head_size) != head_size:
            raise header.error(f"{kind}.{name}", f"but a head has {head_size}")
    scale = header.number(f"{kind}.attention.scale", 0.0, zero=True)
    if scale and not math.isclose(scale, head_size**-0.5, rel_tol=1e-3):
        raise header.error(f"{kind}.attention.scale", "is not 1 / sqrt(size of a head)")
    context = header.integer(f"{kind}.context_length", least=1)
    theta = _theta(header, kind)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "rms_norm_eps": header.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": _scaling(header, tensors, kind, head_size) or {"rope_type": "default"},
        "attention_bias": kind == "qwen2" or "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    return fields | _windows(header, kind, layers, context) | _feed_forward(header, kind, fields)


def _theta(header: Header, kind: str) -> float:
    theta = header.number(f"{kind}.rope.freq_base", 10_000.0)
    if theta <= 1:
        raise header.error(f"{kind}.rope.freq_base", "is not above 1")
    if header.number(f"{kind}.rope.freq_base_swa", theta) != theta:
        raise header.error(f"{kind}.rope.freq_base_swa", f"but rope.freq_base is {theta:g}")
    return theta


def _feed_forward(header: Header, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    count = header.integer(f"{kind}.expert_count", 0)
    if kind not in ("qwen3moe", "gpt-oss"):
        if count:
            raise header.error(f"{kind}.expert_count", f"but experts of {kind} are not supported")
        return {"intermediate_size": header.integer(f"{kind}.feed_forward_length", least=1)}
    count = header.integer(f"{kind}.expert_count", least=1)
    width = header.integer(f"{kind}.expert_feed_forward_length", least=1)
    return {
        "num_experts": count,
        "num_local_experts": count,
        "num_experts_per_tok": header.integer(f"{kind}.expert_used_count", least=1, most=count),
        "moe_intermediate_size": width,
        "norm_topk_prob": header.flag(f"{kind}.expert_weights_norm", True),
        # Qwen's is of layers without experts, which such a file has not.
        "intermediate_size": header.integer(f"{kind}.feed_forward_length", width, least=1)
        if kind == "qwen3moe"
        else width,
    }


def _windows(header: Header, kind: str, layers: int, context: int) -> dict[str, Any]:
    name, pattern = f"{kind}.attention.sliding_window", f"{kind}.attention.sliding_window_pattern"
    if kind != "gpt-oss":
        window = header.integer(name, 0)
        if 0 < window < context:
            raise header.error(name, f"but windows of {kind} are not supported")
        return {}
    window, period = header.integer(name, least=1), header.value(pattern, 2)
    if isinstance(period, np.ndarray):
        if period.dtype != bool or len(period) != layers:
            raise header.error(pattern, f"does not say of each of {layers} layers if it slides")
        slides = period.tolist()
    else:
        period = header.integer(pattern, 2)
        slides = [not period or i % period < period - 1 for i in range(layers)]
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {"sliding_window": window, "layer_types": [kinds[slide] for slide in slides]}


def _scaling(
    header: Header, tensors: dict[str, Tensor], kind: str, head_size: int
) -> dict[str, Any] | None:
    """The field `rope_scaling`, or None."""
    root = f"{kind}.rope.scaling"
    rule = header.text(f"{root}.type", "linear")
    if rule not in ("none", "linear", "yarn"):
        raise header.error(f"{root}.type", "is not one of 'none', 'linear', 'yarn'")
    # A factor of 0, or none, leaves the positions as they are; `scale_linear` is its older name.
    name = f"{root}.factor" if f"{root}.factor" in header else f"{kind}.rope.scale_linear"
    factor = header.number(name, 0.0, zero=True) or 1.0
    if factor < 1:
        raise header.error(name, "is below 1: it would shorten the context")
    attention = header.number(f"{root}.attn_factor", 1.0)
    if "rope_freqs.weight" in tensors:
        if rule == "yarn" or (rule == "linear" and factor != 1):
            raise ValueError(f"{header.file} has both rope_freqs.weight and {name}: not supported")
        rule = "none"
    if rule != "yarn":
        if attention != 1:
            raise header.error(f"{root}.attn_factor", f"is not supported for type {rule!r}, only 1")
        for key in ("yarn_log_multiplier", "yarn_attn_factor"):
            if header.number(f"{root}.{key}", 0.0, zero=True) not in (0, 1):
                raise header.error(f"{root}.{key}", f"but {root}.type is {rule!r}, not 'yarn'")
        if "rope_freqs.weight" in tensors:
            return _llama3(header, tensors["rope_freqs.weight"], kind, head_size)
        return (
            {"rope_type": "linear", "factor": factor} if rule == "linear" and factor != 1 else None
        )
    factor = header.number(name)
    fast = header.number(f"{root}.yarn_beta_fast", 32.0)
    slow = header.number(f"{root}.yarn_beta_slow", 1.0)
    if fast <= slow:
        raise header.error(f"{root}.yarn_beta_fast", f"is not above yarn_beta_slow={slow:g}")
    # `yarn_attn_factor` is the checkpoint's own factor on cosines and sines; `attn_factor` is one
    # more, and `yarn_log_multiplier` its mscale_all_dim, where mscale is 1.
    multiplier = header.number(f"{root}.yarn_log_multiplier", 0.0, zero=True)
    own = yarn_attention_factor(factor, 1.0, multiplier)
    if f"{root}.yarn_attn_factor" in header:
        own = header.number(f"{root}.yarn_attn_factor")
    original = header.integer(
        f"{root}.original_context_length", header.integer(f"{kind}.context_length"), least=1
    )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "attention_factor": own * attention,
        "truncate": kind != "gpt-oss",
    }


def _llama3(header: Header, tensor: Tensor, kind: str, head_size: int) -> dict[str, Any]:
    """Llama 3's rule, from the divisor of each frequency, which is all that the file has of it.

    The largest divisor is the rule's factor; the others must follow from it.
    """
    if tensor.shape != (head_size // 2,):
        raise ValueError(
            f"{header.file}: rope_freqs.weight has shape {tensor.shape}, a head has "
            f"{head_size // 2} frequencies"
        )
    divisors = tensor.dequantize(tensor.map())
    factor, half = float(divisors.max()), len(divisors)
    theta = _theta(header, kind)
    plain = theta ** (-np.arange(half, dtype=np.float32) / half)
    for original in [8192, *(2**n for n in range(10, 21))]:
        if not (np.isfinite(divisors).all() and factor >= 1):
            break
        rule = RopeScaling(kind="llama3", factor=factor, original_context=original)
        if np.allclose(plain / stretch(plain, rule), divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": rule.low_frequency_factor,
                "high_freq_factor": rule.high_frequency_factor,
                "original_max_position_embeddings": original,
            }
    raise ValueError(f"{header.file}: rope_freqs.weight follows no rule that is known here")


def _check_keys(header: Header, kind: str) -> None:
    """Raises ValueError for a key that may change the numbers and that nothing here reads."""
    read = {*_READ, *(_READ_GPT2 if kind == "gpt2" else _READ_ROTARY)}
    neutral = _NEUTRAL | {"expert_gating_func": _GATING.get(kind, (0, 1))}
    known = {*_READ, *_READ_ROTARY, *_READ_GPT2, *neutral, *_HARMLESS}
    for key in header:
        prefix, _, name = key.partition(".")
        if prefix != kind:
            if name in known:
                raise header.error(key, f"is of architecture {prefix!r}, the file of {kind!r}")
            continue
        if name in read or name in _HARMLESS:
            continue
        if name not in neutral:
            raise header.error(key, "is not known here, and may change what the model computes")
        value = header.value(key)
        if isinstance(value, list | np.ndarray) or value not in neutral[name]:
            raise header.error(
                key, f"is not supported, only {' or '.join(map(repr, neutral[name]))}"
            )
    for key in ("general.tensor_extra.name", "general.tensor_extra.prec_a4"):
        if key in header:
            raise header.error(key, "is not supported: it rounds the inputs of products")
    if header.integer("general.quantization_version", 2) != 2:
        raise header.error("general.quantization_version", "is not supported, only 2")
