"""Quantize the weights of a model: which parameters, how they are rounded, and where they go."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from models import rounding
from models.decoder import Decoder
from models.quantized import GROUP, Activations, Parts, QuantizedTable, QuantizedWeight
from sharding.state import named_leaves, unpadded_sharding
from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

Weights = Literal["int8", "int4", "stored"]
WEIGHTS: tuple[Weights, ...] = ("int8", "int4", "stored")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are kept.

    - "int8": one scale for each output channel, of an embedding and a head for each row.
    - "int4": one scale and one minimum for each group of 32; embedding and head as in "int8".
    - "stored": as the file stores them. Blocks of a GGUF file of type Q4_0, Q4_1, Q5_0, Q5_1 and
      Q8_0 are kept exactly, other blocks are rounded to int8 in groups of 32, floats stay floats.
    """

    weights: Weights
    activations: Activations = None  # bits that the inputs of products are rounded to, row by row

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(
                f"weights={self.weights!r} is not one of {', '.join(map(repr, WEIGHTS))}"
            )
        if self.activations not in (None, "int8", "int16"):
            raise ValueError(
                f"activations={self.activations!r} is not one of None, 'int8', 'int16'"
            )
        if self.activations and self.weights != "int8":
            raise ValueError(
                f"activations={self.activations!r} goes with weights='int8', not "
                f"{self.weights!r}: scales must belong to whole output channels"
            )

    def round(self, weight: np.ndarray, is_table: bool) -> Parts:
        """The arrays of a floating weight `[.., in, out]`, or of a table `[vocab, in]`."""
        if is_table:
            return rounding.round_table(weight)
        if weight.shape[-2] % GROUP or self.weights == "int8":
            return rounding.round_by_output(weight)
        if self.weights == "int4":
            return rounding.round_to_int4_groups(weight)
        return rounding.round_to_int8_groups(weight)

    def install(
        self,
        model: Decoder,
        path: str,
        axes: tuple[Any, ...],
        parts: Parts,
        wafer: Wafer | None = None,
    ) -> None:
        """Puts a quantized weight into `model`, in the place of the parameter at `path`.

        Args:
          model: a decoder; it is changed.
          path: of the parameter, as `named_leaves` has it.
          axes: the names of the parameter's dimensions.
          parts: the arrays, on the host or on a device.
          wafer: where they go; None for one device.
        """
        grouped = parts.values.ndim > len(axes)
        if is_table(axes):
            module: nnx.Module = QuantizedTable(parts, grouped, self.activations)
        else:
            in_out = (*axes[:-2], "in", "out")
            module = QuantizedWeight(parts, in_out, grouped, self.activations)
        for variable in jax.tree.leaves(
            nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable)
        ):
            place = unpadded_sharding(variable, wafer)
            variable.set_value(jax.device_put(variable.get_value(), place))
        *way, name = path.split("/")
        owner: Any = model
        for step in way:
            owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
        setattr(owner, name, module)


def quantize(model: Decoder, weights: Weights, activations: Activations = None) -> Decoder:
    """A copy of `model` with weights of eight or four bits; the rest is shared.

    Args:
      model: a decoder with floating weights.
      weights: "int8" (a scale for each output channel) or "int4" (for each group of 32).
      activations: with "int8" weights, "int8" or "int16" rounds the inputs of products too, each
        row by a scale of its own.

    Raises:
      ValueError: an option is not known, or does not go with the other, or the model's weights are
        quantized already.
    """
    quantization = Quantization(weights=weights, activations=activations)
    if weights == "stored":
        raise ValueError("weights='stored' is for load; a model in memory takes 'int8' or 'int4'")
    if is_quantized(model):
        raise ValueError("quantize: the model's weights are quantized already; load it anew")
    copy = nnx.merge(*nnx.split(model))
    for path, leaf in quantizable(nnx.state(model)):
        axes = leaf.get_metadata()["axes"]
        layers = np.asarray(leaf.get_value(), np.float32)
        layers = layers if in_order(axes) else layers.swapaxes(-1, -2)
        parts = (
            quantization.round(layers, True)
            if is_table(axes)
            else stack_parts([quantization.round(layer, False) for layer in layers])
        )
        quantization.install(copy, path, axes, parts, context.resolve(None))
    return copy


def quantizable(state: Any) -> Iterator[tuple[str, nnx.Variable]]:
    """The parameters of a decoder's state that are quantized, and their paths.

    They are the weights of products, of experts too, the embedding and the head. Norms, biases,
    routers and learned positions stay as they are.
    """
    for path, leaf in named_leaves(state).items():
        axes = leaf.get_metadata().get("axes") or ()
        if isinstance(leaf, nnx.Param) and set(axes[-2:]) in ({"in", "out"}, {"vocab", "in"}):
            yield path, leaf


def is_table(axes: tuple[Any, ...]) -> bool:
    """Whether a parameter with these dimensions is an embedding or a head."""
    return "vocab" in axes


def in_order(axes: tuple[Any, ...]) -> bool:
    """Whether the last dimensions are `[in, out]`, or `[vocab, in]` of a table."""
    return axes[-2:] in (("in", "out"), ("vocab", "in"))


def is_quantized(model: Decoder) -> bool:
    """Whether a weight of `model` is kept as integers."""
    return any(isinstance(m, QuantizedWeight | QuantizedTable) for _, m in nnx.iter_modules(model))


def stack_parts(layers: list[Parts]) -> Parts:
    """The arrays of layers of one kind, stacked."""
    values, scales, minima = zip(*layers, strict=True)
    return Parts(
        np.stack(values), np.stack(scales), None if minima[0] is None else np.stack(minima)
    )
