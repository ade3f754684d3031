"""This file is how a grid of PEs is written on a command line."""


def parse_grid(text: str) -> tuple[int, int, int]:
    """`"2x4"` as (wafers, height, width) = (1, 2, 4), and `"3x2x4"` as (3, 2, 4).

    Raises:
      ValueError: it is not two or three positive integers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(
            f"wafer={text!r} is not a grid; write HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH, such as 2x4"
        )
    sizes = [int(part) for part in parts]
    if min(sizes) < 1:
        raise ValueError(f"wafer={text!r} has a side of 0; every side must be 1 or more")
    wafers, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return wafers, height, width
