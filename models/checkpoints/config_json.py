"""Read and write the fields of config.json that the families share.

transformers 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`; 5 writes `rope_parameters` and
`dtype`. Both styles are read. The later one is written, which 4.56 and later read too.
"""

import json
from typing import Any

from models.checkpoints.json_file import shown
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


_LARGEST = 2**31 - 1  # the largest index of JAX's default integers
_MOST_LAYERS = 10_000
_SMALLEST_FLOAT, _LARGEST_FLOAT = 1.2e-38, 3.4e38  # of float32
_NEEDED: Any = object()  # the default of a field that must be given


def whole(
    fields: dict[str, Any],
    *names: str,
    default: Any = _NEEDED,
    least: int = 1,
    most: int = _LARGEST,
) -> Any:
    """The whole number that config.json has under one of `names`; null counts as missing.

    Args:
      fields: config.json.
      names: the field, and other names for it.
      default: returned if it is missing.
      least: the smallest number allowed.
      most: the largest.

    Raises:
      ValueError: it is no whole number from `least` to `most`, differs between two of the names, or
        is missing without a default.
    """
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in given.items():
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{name}={shown(value)} is not a whole number from {least:,} to {most:,}"
            )
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{both} are the same field, but differ")
    if given:
        return next(iter(given.values()))
    if default is _NEEDED:
        raise ValueError(f"has no {' nor '.join(map(repr, names))}, which the model needs")
    return default


def number(
    fields: dict[str, Any], name: str, default: Any = _NEEDED, *, zero: bool = False
) -> float:
    """The number in a field of config.json.

    Args:
      fields: config.json, or an object in it.
      name: the field.
      default: returned if it is missing.
      zero: whether 0 is allowed.

    Raises:
      ValueError: it is not above 0, is 0 or infinite in float32, NaN, no number, or missing
        without a default.
    """
    value = fields.get(name, default)
    if value is _NEEDED:
        raise ValueError(f"has no {name!r}, which the model needs")
    least = 0 if zero else _SMALLEST_FLOAT
    if type(value) not in (int, float) or not least <= value <= _LARGEST_FLOAT:  # NaN is not
        raise ValueError(f"{name}={shown(value)} is not a number {'from' if zero else 'above'} 0")
    return float(value)


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
    """The truth value in a field of config.json.

    Raises:
      ValueError: it is neither true nor false.
    """
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} is neither true nor false")
    return value


def layer_count(fields: dict[str, Any], name: str = "num_hidden_layers", *more: str) -> int:
    """How many layers there are.

    Raises:
      ValueError: it is missing, or more than any model has.
    """
    return whole(fields, name, *more, most=_MOST_LAYERS)


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
    result = _ACTIVATIONS.get(value) if isinstance(value, str) else None
    if result not in known:
        values = sorted(v for v, activation in _ACTIVATIONS.items() if activation in known)
        raise ValueError(f"{name}={shown(value)} is not one of {values}")
    return result


def rope(fields: dict[str, Any], theta: float = 10_000.0) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `DecoderConfig`, from either style.

    Args:
      fields: config.json.
      theta: the base, if config.json has none.

    Raises:
      ValueError: the kind of scaling is unknown, a number of it is missing or out of range, or only
        part of a head is rotated.
    """
    for style in ("rope_scaling", "rope_parameters"):
        if not isinstance(fields.get(style), dict | None):
            raise ValueError(f"{style}={shown(fields[style])} is not an object")
    style = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = fields.get(style) or {}
    theta = number(fields, "rope_theta", theta)
    for holder in (fields, values):
        if (partial := holder.get("partial_rotary_factor")) not in (None, 1):
            raise ValueError(f"partial_rotary_factor={shown(partial)} is not supported, only 1")
    try:
        return _rope(values, fields, number(values, "rope_theta", theta))
    except ValueError as error:
        raise ValueError(f"{style}: {error}" if values else str(error)) from None


def _rope(values: dict[str, Any], fields: dict[str, Any], theta: float) -> dict[str, Any]:
    names = [values[name] for name in ("rope_type", "type") if values.get(name) is not None]
    kind: Any = names[0] if names else None
    alone = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind is None and (unknown := sorted(set(values) - alone)):
        raise ValueError(f"has {shown(unknown)}, but no 'rope_type', which says what they do")
    if kind in (None, "default"):
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope type {shown(kind)} is not one of 'default', 'linear', 'llama3', 'yarn'"
        )
    length = "original_max_position_embeddings"
    original = whole(fields, length, default=None) or whole(values, length, default=None)
    context = whole(fields, "max_position_embeddings", default=None)
    if original is None and (original := context) is None:
        raise ValueError(f"has no {length!r}, which {kind!r} needs")
    factor = values.get("factor")
    if factor is None and kind == "yarn" and context is not None:
        factor = context / original
    factor = number({} if factor is None else {"factor": factor}, "factor")
    options: dict[str, Any] = {}
    if kind == "llama3":
        options["low_frequency_factor"] = number(values, "low_freq_factor")
        options["high_frequency_factor"] = number(values, "high_freq_factor")
    if kind == "yarn":
        # As in transformers, 0 and null mean the default.
        given = {name: value for name, value in values.items() if value}
        options = {
            "beta_fast": number(given, "beta_fast", 32),
            "beta_slow": number(given, "beta_slow", 1),
            "truncate": flag(values, "truncate", True),
            "attention_factor": number(
                given,
                "attention_factor",
                yarn_attention_factor(
                    factor,
                    number(given, "mscale") if "mscale" in given else None,
                    number(given, "mscale_all_dim") if "mscale_all_dim" in given else None,
                ),
            ),
        }
    scaling = RopeScaling(kind=kind, factor=factor, original_context=original, **options)
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
      default: for each layer whether it has it, if config.json has no `layer_types`.

    Raises:
      ValueError: a layer is of an unknown type, there are more or fewer types than layers, or the
        size of the window is missing.
    """
    types, slides = fields.get("layer_types"), default
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"layer_types={shown(types)} is not a list of names")
        if unknown := set(types) - set(known):
            raise ValueError(f"layer_types has {shown(sorted(unknown))}, not in {list(known)}")
        if len(types) != len(default):
            raise ValueError(f"layer_types has {len(types)} layers, there are {len(default)}")
        slides = tuple(known[kind] for kind in types)
    if not any(slides):
        return ()
    window = whole(fields, "sliding_window", default=None)
    if window is None:
        raise ValueError(
            "layer_types has layers that slide, but sliding_window is not given, or "
            "use_sliding_window is off"
        )
    return tuple(window if slide else None for slide in slides)


def decoder(fields: dict[str, Any], **family: Any) -> DecoderConfig:
    """The config of a Llama-like decoder; `family` overrides or adds fields of the config.

    Raises:
      ValueError: a field is missing, of a wrong type or out of range; names it and its value.
    """
    heads, width = whole(fields, "num_attention_heads"), whole(fields, "hidden_size")
    kv_heads = whole(fields, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    if fields.get("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
    head_size = whole(fields, "head_dim", default=None)
    if (head_size or width // heads) % 2:
        given = f"head_dim={head_size}"
        if head_size is None:
            given = f"hidden_size={width} and num_attention_heads={heads} make heads of "
            given += str(width // heads)
        raise ValueError(f"{given}, but rotary positions need an even head size")
    sizes: dict[str, Any] = {
        "vocab": whole(fields, "vocab_size"),
        "d_model": width,
        "d_ff": whole(fields, "intermediate_size"),
        "layers": layer_count(fields),
        "heads": heads,
        "kv_heads": kv_heads,
        "context": whole(fields, "max_position_embeddings"),
        "head_size": head_size,
        "norm_eps": number(fields, "rms_norm_eps", 1e-6),
        "tied": flag(fields, "tie_word_embeddings", False),
        "weights": "out_in",
        "init_std": number(fields, "initializer_range", 0.02, zero=True),
        "source": json.dumps(fields),
    }
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
