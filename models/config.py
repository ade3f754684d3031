"""The sizes and choices of a decoder; imports no jax, so that `--help` is quick."""

import dataclasses
import itertools
import math
import numbers
import typing
from collections.abc import Iterator
from typing import Literal, NamedTuple

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss"]
Biased = Literal["qkv", "out", "mlp", "norm"]
_SCALING_NUMBERS = (
    *("factor", "attention_factor", "beta_fast", "beta_slow"),
    *("low_frequency_factor", "high_frequency_factor"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context; `models.rope` has the formulas."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context: int = 0  # tokens the model was first trained on; not used by "linear"
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: frequencies with more turns in the original context are kept
    beta_slow: float = 1.0  # yarn: those with fewer are divided by `factor`
    truncate: bool = True  # yarn: whether the ramp begins and ends at whole dimensions
    attention_factor: float = 1.0  # yarn: factor on cosines and sines

    def __post_init__(self) -> None:
        for name in _SCALING_NUMBERS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"rope scaling: {name}={getattr(self, name)} must be a number above 0"
                )
        if self.factor < 1:
            raise ValueError(
                f"rope scaling: factor={self.factor} would shorten the context; it must be 1 or "
                "more"
            )
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"rope scaling: low_frequency_factor={self.low_frequency_factor} must be below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"rope scaling: beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}"
            )
        if self.kind != "linear" and self.original_context < 1:
            raise ValueError(
                f"rope scaling: {self.kind!r} needs the original context, in tokens; it is "
                f"{self.original_context}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The sparse feed-forward layers of a mixture of experts."""

    count: int
    chosen: int  # experts of each token
    d_ff: int  # of one expert
    router: Literal["softmax_top", "top_softmax"] = "softmax_top"
    normalized: bool = True  # softmax_top: whether the chosen shares are scaled to sum to 1
    biases: bool = False  # of the router and of the experts
    balance: float = 0.001  # factor on the load-balance loss in training

    def __post_init__(self) -> None:
        for name in ("count", "chosen", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"experts: {name}={getattr(self, name)} must be 1 or more")
        if self.chosen > self.count:
            raise ValueError(
                f"experts: chosen={self.chosen} of count={self.count}: no token can choose more "
                "experts than there are"
            )


class LayerKind(NamedTuple):
    """What may differ from layer to layer; layers of one kind run the same program."""

    window: int | None  # how many keys a token sees, its own included; None: all before it
    sparse: bool  # whether its feed-forward is a mixture of experts
    scale: float  # factor on attention's scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norm blocks; defaults are Llama's choices."""

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    context: int  # the longest sequence, in tokens
    head_size: int | None = None  # None: d_model / heads
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    activation: Literal["swiglu", "clamped_swiglu", "gelu", "gelu_tanh", "relu"] = "swiglu"
    swiglu_alpha: float = 1.702  # clamped_swiglu: gain of the sigmoid
    swiglu_limit: float = 7.0  # clamped_swiglu: gate and up are clamped to this
    biases: tuple[Biased, ...] = ()  # which products add one, and whether norm="layer" does
    qk_norm: bool = False  # RMSNorm of each head of queries and keys, before the rotation
    sinks: bool = False  # a learned score a head that only adds to the softmax's denominator
    scaled_attention: bool = True  # scores are divided by the square root of the head size
    scaled_by_layer: bool = False  # and by the layer's number, counted from 1
    windows: tuple[int | None, ...] = ()  # window of each layer, in tokens; empty: none has one
    experts: ExpertsConfig | None = None
    sparse_layers: tuple[bool, ...] = ()  # which layers have experts; empty: all, if `experts`
    tied: bool = False  # the head is the embedding, transposed
    init_std: float = 0.02
    # Most checkpoints store weights as [out, in]; in the same order, loading transposes nothing.
    weights: Literal["in_out", "out_in"] = "in_out"
    # True: layers of one kind share one array, for scans. False: one array a layer, for generation.
    stacked: bool = True
    family: Family = "llama"  # decides the names and the config.json of a saved checkpoint
    source: str = ""  # text of the config.json it was read from, to write unknown fields back

    def __post_init__(self) -> None:
        for name in ("vocab", "d_model", "d_ff", "layers", "heads", "kv_heads", "context"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}={value!r} must be 1 or more, a whole number")
        for name in ("norm_eps", "rope_theta", "swiglu_alpha", "swiglu_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std={self.init_std} must be a number from 0")
        if self.rope_theta <= 1:  # frequencies would grow along a head, or all be one
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1")
        for name, hint in typing.get_type_hints(type(self)).items():
            known = typing.get_args(hint)
            if typing.get_origin(hint) is Literal and getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {known}")
        if unknown := set(self.biases) - set(typing.get_args(Biased)):
            raise ValueError(
                f"biases={self.biases}: {sorted(unknown)} is none of qkv, out, mlp, norm"
            )
        if self.head_size is not None and self.head_size < 1:
            raise ValueError(f"head_size={self.head_size} must be 1 or more")
        if self.head_size is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of heads={self.heads}; change one of "
                "them or set head_size"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        for name in ("windows", "sparse_layers"):
            if (count := len(getattr(self, name))) not in (0, self.layers):
                raise ValueError(f"{name} names {count} layers, there are {self.layers}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows} must be 1 token or more, or None")
        if any(self.sparse_layers) and self.experts is None:
            raise ValueError("sparse_layers needs experts=ExpertsConfig(..)")
        if self.positions == "rotary" and self.d_head % 2:
            given = f"head_size={self.head_size}"
            if self.head_size is None:
                given = f"d_model={self.d_model} / heads={self.heads} is {self.d_head}"
            raise ValueError(f"{given}: rotary positions need an even head size")

    @property
    def d_head(self) -> int:
        """Size of one head."""
        return self.d_model // self.heads if self.head_size is None else self.head_size

    @property
    def d_attention(self) -> int:
        """Size of all query heads together."""
        return self.heads * self.d_head

    @property
    def d_kv(self) -> int:
        """Size of all key (or value) heads together."""
        return self.kv_heads * self.d_head

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies its activation by a second product."""
        return self.activation in ("swiglu", "clamped_swiglu")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        scale = self.d_head**-0.5 if self.scaled_attention else 1.0
        if self.rope_scaling is not None:  # squared: queries and keys are both scaled by it
            scale *= self.rope_scaling.attention_factor**2
        sparse = self.sparse_layers or (self.experts is not None,) * self.layers
        windows = self.windows or (None,) * self.layers
        return tuple(
            LayerKind(windows[i], sparse[i], scale / (i + 1 if self.scaled_by_layer else 1))
            for i in range(self.layers)
        )

    @property
    def stages(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers in order, as stages: (the kinds of one period, how many periods).

        With layers of kinds A and B:

        - A A A A A A is one stage: `((A,), 6)`.
        - A B A B A B is one stage: `((A, B), 3)`.
        - A A A A B B is two stages: `((A,), 4), ((B,), 2)`.
        """
        kinds = self.kinds
        if not self.stacked:
            return tuple(((kind,), 1) for kind in kinds)
        for length in range(1, 5):
            periods, remainder = divmod(len(kinds), length)
            if not remainder and kinds == kinds[:length] * periods:
                return ((kinds[:length], periods),)
        return tuple(((kind,), len(list(run))) for kind, run in itertools.groupby(kinds))

    def places(self) -> Iterator[tuple[int, int, int]]:
        """For each layer in order: its stage, its place in the period, the number of the period."""
        for stage, (kinds, periods) in enumerate(self.stages):
            for period in range(periods):
                yield from ((stage, position, period) for position in range(len(kinds)))

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one training step per token: three times those of the forward pass.

        A multiply-add is two FLOPs. Counted: the products, and the causal half of attention's
        scores. Not counted: norms, activations, the softmax, recomputation.

        Args:
          context: length of the sequence, in tokens.
        """
        attention = self.d_model * (2 * self.d_attention + 2 * self.d_kv)
        each = self.d_model * (3 if self.gated else 2)
        products, scores = self.d_model * self.vocab, 0
        for kind in self.kinds:
            products += attention + each * self.d_ff * (not kind.sparse)
            if kind.sparse and self.experts is not None:
                products += each * self.experts.d_ff * self.experts.chosen
                products += self.d_model * self.experts.count
            seen = context if kind.window is None else min(context, 2 * kind.window)
            scores += self.d_attention * seen  # two products (q k, p v), half of the square each
        return 3 * 2 * (products + scores)
