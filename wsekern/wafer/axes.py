"""The names of the mesh axes.

A grid of PEs is `height x width`, with (0, 0) in the north-west, as on the physical wafer.
"""

ROWS = "y"  # the row index, north to south
COLS = "x"  # the column index, west to east
WAFERS = "wafer"  # which wafer, if several work together
AXES = (WAFERS, ROWS, COLS)  # outermost first
# Virtual PEs may be spread over devices in blocks: the mesh axis of the devices, for each axis.
SPREAD = {WAFERS: "wafer_devices", ROWS: "y_devices", COLS: "x_devices"}


def axes_of(entry: None | str | tuple[str, ...]) -> tuple[str, ...]:
    """The axes over which one entry of a spec splits its dimension."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
