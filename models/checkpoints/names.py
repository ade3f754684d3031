"""This file is what checkpoints call a decoder's parameters, and how they hold them."""

import dataclasses
from typing import Literal, NamedTuple


class Slot(NamedTuple):
    """Where a checkpoint holds a parameter of a layer, or one outside the layers."""

    name: str  # "{expert}" stands for the number of an expert, each a tensor of its own
    order: Literal["in_out", "out_in", "same"] = "same"  # of the last two dimensions
    # Of a tensor that holds several parameters along its outputs: the one, and of which.
    part: tuple[int, tuple[str, ...]] | None = None
    interleaved: bool = False  # in turns, and not one after the other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a family: of the parameters of a layer, and of those outside."""

    prefix: str  # of all but the head; a checkpoint of the bare model leaves it out
    layers: str  # what layers stand under
    block: dict[str, Slot]  # by the parameter's path in a layer
    top: dict[str, Slot]
    head: Slot
    ignored: tuple[str, ...] = ()  # ends of names that hold no parameter


_QKV = ("attention/query", "attention/key", "attention/value")


def _linear(ours: str, theirs: str) -> dict[str, Slot]:
    return {
        f"{ours}/weight": Slot(f"{theirs}.weight", "out_in"),
        f"{ours}/bias": Slot(f"{theirs}.bias"),
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
    ignored=("rotary_emb.inv_freq",),
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
        ours: Slot("mlp.experts.gate_up_proj", "in_out", (which, _GATE_UP), interleaved=True)
        for which, ours in enumerate(_GATE_UP)
    }
    | {
        f"{ours}_bias": Slot(
            "mlp.experts.gate_up_proj_bias",
            part=(which, tuple(f"{name}_bias" for name in _GATE_UP)),
            interleaved=True,
        )
        for which, ours in enumerate(_GATE_UP)
    },
)


def _conv1d(ours: str, theirs: str) -> dict[str, Slot]:
    # GPT-2's Conv1D keeps its weight [in, out], other than every later Linear.
    return {
        f"{ours}/weight": Slot(f"{theirs}.weight", "in_out"),
        f"{ours}/bias": Slot(f"{theirs}.bias"),
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
        f"{ours}/{end}": Slot(
            f"attn.c_attn.{end}",
            "in_out" if end == "weight" else "same",
            (which, tuple(f"{name}/{end}" for name in _QKV)),
        )
        for which, ours in enumerate(_QKV)
        for end in ("weight", "bias")
    },
    top={
        "embedding": Slot("wte.weight"),
        "positions": Slot("wpe.weight"),
        "norm/scale": Slot("ln_f.weight"),
        "norm/bias": Slot("ln_f.bias"),
    },
    head=Slot("lm_head.weight", "out_in"),
    ignored=("attn.bias", "attn.masked_bias"),
)
