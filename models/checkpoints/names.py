"""What checkpoints call a decoder's parameters, and how they store them."""

import dataclasses
from typing import Literal, NamedTuple


class Slot(NamedTuple):
    """The tensor of a checkpoint that stores a parameter."""

    name: str  # "{expert}" stands for an expert's number; each expert is then a tensor of its own
    order: Literal["in_out", "out_in", "same"] = "same"  # of the last two dimensions
    # For a tensor that stores several parameters along its outputs: which one this is, and the
    # paths of all. GPT-2's c_attn is query, key and value: the key is (1, (query, key, value)).
    part: tuple[int, tuple[str, ...]] | None = None
    interleaved: bool = False  # whether their columns take turns instead of following in blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Where a family's checkpoints store each parameter."""

    prefix: str  # of all names but the head's; a checkpoint of the bare model leaves it out
    layers: str  # layer 3 is f"{prefix}{layers}.3."
    block: dict[str, Slot]  # parameters of a layer, by their path in it
    top: dict[str, Slot]  # parameters outside the layers, by their path
    head: Slot
    ignored: tuple[str, ...] = ()  # endings of tensors that are not parameters


_QKV = ("attention/query", "attention/key", "attention/value")


def _linear(path: str, tensor: str) -> dict[str, Slot]:
    return {
        f"{path}/weight": Slot(f"{tensor}.weight", "out_in"),
        f"{path}/bias": Slot(f"{tensor}.bias"),
    }


LLAMA = Names(
    prefix="model.",
    layers="layers",
    block={
        "attention_norm/scale": Slot("input_layernorm.weight"),
        "feed_forward_norm/scale": Slot("post_attention_layernorm.weight"),
        "attention/query_norm/scale": Slot("self_attn.q_norm.weight"),
        "attention/key_norm/scale": Slot("self_attn.k_norm.weight"),
        "attention/sinks": Slot("self_attn.sinks"),
        **_linear("attention/query", "self_attn.q_proj"),
        **_linear("attention/key", "self_attn.k_proj"),
        **_linear("attention/value", "self_attn.v_proj"),
        **_linear("attention/out", "self_attn.o_proj"),
        **_linear("feed_forward/gate", "mlp.gate_proj"),
        **_linear("feed_forward/up", "mlp.up_proj"),
        **_linear("feed_forward/down", "mlp.down_proj"),
    },
    top={"embedding": Slot("embed_tokens.weight"), "norm/scale": Slot("norm.weight")},
    head=Slot("lm_head.weight", "out_in"),
    ignored=(".rotary_emb.inv_freq",),
)

QWEN3_MOE = dataclasses.replace(
    LLAMA,
    block=LLAMA.block
    | {
        "feed_forward/router": Slot("mlp.gate.weight", "out_in"),
        "feed_forward/gate": Slot("mlp.experts.{expert}.gate_proj.weight", "out_in"),
        "feed_forward/up": Slot("mlp.experts.{expert}.up_proj.weight", "out_in"),
        "feed_forward/down": Slot("mlp.experts.{expert}.down_proj.weight", "out_in"),
    },
)

_GATE_UP = ("feed_forward/gate", "feed_forward/up")
GPT_OSS = dataclasses.replace(
    LLAMA,
    block=LLAMA.block
    | {
        "feed_forward/router": Slot("mlp.router.weight", "out_in"),
        "feed_forward/router_bias": Slot("mlp.router.bias"),
        "feed_forward/down": Slot("mlp.experts.down_proj", "in_out"),
        "feed_forward/down_bias": Slot("mlp.experts.down_proj_bias"),
    }
    | {
        path: Slot("mlp.experts.gate_up_proj", "in_out", (i, _GATE_UP), interleaved=True)
        for i, path in enumerate(_GATE_UP)
    }
    | {
        f"{path}_bias": Slot(
            "mlp.experts.gate_up_proj_bias",
            part=(i, tuple(f"{name}_bias" for name in _GATE_UP)),
            interleaved=True,
        )
        for i, path in enumerate(_GATE_UP)
    },
)


def _conv1d(path: str, tensor: str) -> dict[str, Slot]:
    # GPT-2's Conv1D stores its weight as [in, out]; every later family's Linear as [out, in].
    return {
        f"{path}/weight": Slot(f"{tensor}.weight", "in_out"),
        f"{path}/bias": Slot(f"{tensor}.bias"),
    }


GPT2 = Names(
    prefix="transformer.",
    layers="h",
    block={
        "attention_norm/scale": Slot("ln_1.weight"),
        "attention_norm/bias": Slot("ln_1.bias"),
        "feed_forward_norm/scale": Slot("ln_2.weight"),
        "feed_forward_norm/bias": Slot("ln_2.bias"),
        **_conv1d("attention/out", "attn.c_proj"),
        **_conv1d("feed_forward/up", "mlp.c_fc"),
        **_conv1d("feed_forward/down", "mlp.c_proj"),
    }
    | {
        f"{path}/{end}": Slot(
            f"attn.c_attn.{end}",
            "in_out" if end == "weight" else "same",
            (i, tuple(f"{name}/{end}" for name in _QKV)),
        )
        for i, path in enumerate(_QKV)
        for end in ("weight", "bias")
    },
    top={
        "embedding": Slot("wte.weight"),
        "positions": Slot("wpe.weight"),
        "norm/scale": Slot("ln_f.weight"),
        "norm/bias": Slot("ln_f.bias"),
    },
    head=Slot("lm_head.weight", "out_in"),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
