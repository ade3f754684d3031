"""From the names of an array's dimensions to the axes of the wafer that they lie along.

Weights are named by position, not by role: every product is `[in, out]`, so one row of the table
serves query, gate and head. A parameter has two homes: where it computes, and where it lives. They
differ where a train state is split over the wafers instead of repeated on each.
"""

from typing import Literal

from jax.sharding import PartitionSpec as P

from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of

Home = Literal["wafer", "memoryx"]

# name of a dimension -> (its axis where the array computes, its axes where the array lives)
TABLE: dict[str, tuple[str | None, str | tuple[str, ...] | None]] = {
    # activations
    "batch": (WAFERS, None),
    "seq": (ROWS, None),
    "feature": (COLS, COLS),  # also 1-D weights that act on features: scales and biases of norms
    # weights
    # Rows first: a row of PEs has the same features on all wafers, so one gather over the wafers
    # brings what it computes with.
    "in": (ROWS, (ROWS, WAFERS)),
    "out": (COLS, COLS),  # also biases that are added to a product
    # A head is ("in", "vocab"). An embedding is ("vocab", "in"), the head transposed tile by tile:
    # the lookup sums over x, where the vocabulary lies, and leaves its result's features along x.
    "vocab": (COLS, COLS),
    "heads": (COLS, COLS),
    "position": (None, None),
    "layer": (None, None),
    "expert": (WAFERS, WAFERS),
}


def spec_of(axes: tuple[str | None, ...], home: Home = "wafer") -> P:
    """The `PartitionSpec` of an array whose dimensions are called `axes`.

    `spec_of(("layer", "in", "out"))` is `P(None, "y", "x")`.

    Args:
      axes: for each dimension a name from `TABLE`; None for a dimension that is never split.
      home: "wafer" for where the array computes, "memoryx" for where it lives if its state is
        split over the wafers. There a dimension leaves an axis to the one that computes along it:
        experts lie over the wafers, so their features do not.

    Raises:
      ValueError: a name is not in the table, or two dimensions would lie along one axis.
    """
    for name in axes:
        if name is not None and name not in TABLE:
            raise ValueError(f"axes={axes}: {name!r} is not one of {sorted(TABLE)}")
    entries = [_entry(name, axes, home) for name in axes]
    used = [axis for entry in entries for axis in axes_of(entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"axes={axes} would lay two dimensions along one axis: {P(*entries)}")
    return P(*entries)


def _entry(
    name: str | None, axes: tuple[str | None, ...], home: Home
) -> None | str | tuple[str, ...]:
    if name is None:
        return None
    computes_along, lives_along = TABLE[name]
    if home == "wafer":
        return computes_along
    taken = {TABLE[other][0] for other in axes if other is not None and other != name}
    kept = tuple(axis for axis in axes_of(lives_along) if axis not in taken)
    return kept[0] if len(kept) == 1 else kept or None
