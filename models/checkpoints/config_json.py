"""Read and write the fields of config.json that the families share.

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`; 5 writes `rope_parameters` and
`dtype`. Both styles are read. The later one is written, which 4.56 and later read too.
"""

import json
from typing import Any

from models.config import DecoderConfig, ExpertsConfig, RopeScaling
from models.rope import yarn_attention_factor

# name in config.json -> name in DecoderConfig
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "swiglu",
    "swish": "swiglu",
}


def need(fields: dict[str, Any], *names: str) -> Any:
    """The value of the first of `names` that config.json has.

    Raises:
      ValueError: config.json has none of them.
    """
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(f"config.json has no {' nor '.join(map(repr, names))}, which the model needs")


def activation(fields: dict[str, Any], name: str, known: tuple[str, ...], default: str) -> Any:
    """`DecoderConfig.activation` for a config.json.

    Args:
      fields: config.json.
      name: the field that names the activation.
      known: the activations that the family has.
      default: the value of a field that is missing.

    Raises:
      ValueError: the activation is not one of `known`.
    """
    value = fields.get(name, default)
    result = _ACTIVATIONS.get(value)
    if result not in known:
        values = sorted(v for v, activation in _ACTIVATIONS.items() if activation in known)
        raise ValueError(f"config.json: {name}={value!r} is not one of {values}")
    return result


def rope(fields: dict[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `DecoderConfig`, from either style.

    Args:
      fields: config.json.
      theta: the base, if config.json has none.

    Raises:
      ValueError: the kind of scaling is unknown, or only part of a head is rotated.
    """
    values = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = float(values.get("rope_theta") or fields.get("rope_theta") or theta)
    partial = values.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor={partial} is not supported, only 1")
    kind: Any = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"config.json: rope type {kind!r} is not one of 'default', 'linear', 'llama3', 'yarn'"
        )
    original = (
        fields.get("original_max_position_embeddings")
        or values.get("original_max_position_embeddings")
        or need(fields, "max_position_embeddings")
    )
    factor = values.get("factor")
    if factor is None and kind == "yarn":
        factor = need(fields, "max_position_embeddings") / original
    factor = float(need({"rope factor": factor}, "rope factor"))
    options: dict[str, Any] = {}
    if kind == "llama3":
        options["low_frequency_factor"] = float(need(values, "low_freq_factor"))
        options["high_frequency_factor"] = float(need(values, "high_freq_factor"))
    if kind == "yarn":
        options = {
            "beta_fast": float(values.get("beta_fast") or 32),
            "beta_slow": float(values.get("beta_slow") or 1),
            "truncate": bool(values.get("truncate", True)),
            "attention_factor": float(
                values.get("attention_factor")
                or yarn_attention_factor(factor, values.get("mscale"), values.get("mscale_all_dim"))
            ),
        }
    scaling = RopeScaling(kind=kind, factor=factor, original_context=int(original), **options)
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_fields(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    parameters: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_type": scaling.kind,
        "factor": scaling.factor,
    }
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_frequency_factor
        parameters["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        for name in ("beta_fast", "beta_slow", "truncate", "attention_factor"):
            parameters[name] = getattr(scaling, name)
    return parameters


def windows(fields: dict[str, Any], default: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The window of each layer, in tokens; empty if none has one.

    Args:
      fields: config.json; its `layer_types` says which layers have the window.
      default: which layers have it, if config.json has no `layer_types`.

    Raises:
      ValueError: a layer is of an unknown type, or the size of the window is missing.
    """
    types, window = fields.get("layer_types"), fields.get("sliding_window")
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if unknown := set(types) - set(known):
            raise ValueError(
                f"config.json: layer_types has {sorted(unknown)}, not in {list(known)}"
            )
        default = tuple(known[kind] for kind in types)
    if not any(default):
        return ()
    if window is None:
        raise ValueError("config.json: layers slide, but sliding_window is not given")
    return tuple(int(window) if slides else None for slides in default)


def decoder(fields: dict[str, Any], **family: Any) -> DecoderConfig:
    """The config of a Llama-like decoder; `family` overrides or adds fields of the config."""
    heads = int(need(fields, "num_attention_heads"))
    d_model = int(need(fields, "hidden_size"))
    kv_heads = fields.get("num_key_value_heads")
    sizes: dict[str, Any] = {
        "vocab": int(need(fields, "vocab_size")),
        "d_model": d_model,
        "layers": int(need(fields, "num_hidden_layers")),
        "heads": heads,
        "kv_heads": heads if kv_heads is None else int(kv_heads),
        "head_size": fields.get("head_dim"),
        "norm_eps": float(fields.get("rms_norm_eps", 1e-6)),
        "tied": bool(fields.get("tie_word_embeddings", False)),
        "weights": "out_in",
        "init_std": float(fields.get("initializer_range", 0.02)),
        "source": json.dumps(fields),
    }
    if "d_ff" not in family:
        sizes["d_ff"] = int(need(fields, "intermediate_size"))
    if "context" not in family:
        sizes["context"] = int(need(fields, "max_position_embeddings"))
    return DecoderConfig(**(sizes | rope(fields) | family))


def decoder_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json that all Llama-like families share."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.d_head,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "rope_parameters": rope_fields(config),
    }


def window_fields(config: DecoderConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window` of config.json.

    Raises:
      ValueError: layers have windows of different sizes, which config.json cannot express.
    """
    windows = config.windows or (None,) * config.layers
    names = {True: "full_attention", False: "sliding_attention"}
    sizes = [window for window in windows if window is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"windows={windows}: config.json has one sliding window for all layers")
    return {
        "layer_types": [names[window is None] for window in windows],
        "sliding_window": sizes[0] if sizes else None,
    }


def expert_fields(experts: ExpertsConfig) -> dict[str, Any]:
    """The fields of a mixture of experts, under the names of both styles."""
    return {
        "num_experts": experts.count,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "router_aux_loss_coef": experts.balance,
    }
