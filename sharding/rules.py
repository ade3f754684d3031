"""This file is the table from the names of an array's dimensions to the axes of the wafer.

Weights are named by position, not by role: every product is `[in, out]`, so that one row serves
query, gate and head alike. A parameter has two homes, where it computes and where it lives; they
differ only when weights are streamed.
"""

from typing import Literal

from jax.sharding import PartitionSpec as P

from wsekern.wafer.axes import COLS, ROWS, WAFERS

Home = Literal["wafer", "memoryx"]

# name of a dimension -> (where it lies on the wafer, where it lies at home)
TABLE: dict[str, tuple[str | None, str | tuple[str, ...] | None]] = {
    # activations
    "batch": (WAFERS, None),
    "seq": (ROWS, None),
    "feature": (COLS, COLS),  # also the 1-D weights that act on features: scales, biases of norms
    # weights
    "in": (ROWS, (WAFERS, ROWS)),
    "out": (COLS, COLS),  # also the biases that are added to a product
    # A head is ("in", "vocab"), an embedding ("vocab", "in"), the head transposed tile by tile. The
    # lookup sums over x, where the vocabulary lies, and leaves its result with features along x.
    "vocab": (COLS, COLS),
    "heads": (COLS, COLS),
    "position": (None, None),
    "layer": (None, None),  # the streamed axis
    "expert": (WAFERS, WAFERS),
}


def spec_of(axes: tuple[str | None, ...], home: Home = "wafer") -> P:
    """The `PartitionSpec` of an array whose dimensions are called `axes`.

    Args:
      axes: a name of `TABLE` for each dimension; None for one that is never split.
      home: "wafer" for where it computes, "memoryx" for where it lives when weights are streamed.

    Raises:
      ValueError: a name is not in the table, or two dimensions would lie along one axis.
    """
    column = {"wafer": 0, "memoryx": 1}[home]
    entries = []
    for name in axes:
        if name is not None and name not in TABLE:
            raise ValueError(f"axes={axes}: {name!r} is not one of {sorted(TABLE)}")
        entries.append(None if name is None else TABLE[name][column])
    used = [a for entry in entries for a in ((entry,) if isinstance(entry, str) else entry or ())]
    if len(set(used)) < len(used):
        raise ValueError(f"axes={axes} would lay two dimensions along one axis: {P(*entries)}")
    return P(*entries)
