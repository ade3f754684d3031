"""This file is the names of the mesh axes, spelled once.

A grid of PEs is `height x width`, with (0, 0) in the north-west, as on the wafer.
"""

ROWS = "y"  # the row index, north to south
COLS = "x"  # the column index, west to east
WAFERS = "wafer"  # which wafer, where several work together
AXES = (WAFERS, ROWS, COLS)  # outermost first
# The axes of a mesh over whose devices virtual PEs are spread, in blocks along one of the above
SPREAD = {WAFERS: "wafer_devices", ROWS: "y_devices", COLS: "x_devices"}


def axes_of(entry: None | str | tuple[str, ...]) -> tuple[str, ...]:
    """The axes that one entry of a spec splits its dimension over."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
