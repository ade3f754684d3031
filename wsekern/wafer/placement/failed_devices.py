"""Grids of devices when some have failed: which devices make one, and the largest that is left.

TPUs have coordinates in a plane. A grid of them is a rectangle of the plane without a failed
device, so that neighbors in the grid are neighbors in the machine. Other devices have no
coordinates and all talk to one another at the same cost: any that work will do.
"""

import collections
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped


def working_devices(devices: Sequence[Any], failed: Collection[int]) -> list[Any]:
    """`devices` without those whose ids are in `failed`.

    Raises:
      ValueError: `failed` has an id that no device has.
    """
    ids = [device.id for device in devices]
    strangers = sorted(set(failed) - set(ids))
    if strangers:
        raise ValueError(
            f"Wafer.devices: failed={sorted(failed)} names {strangers}, which are no devices here; "
            f"their ids are {sorted(ids)}"
        )
    return [device for device in devices if device.id not in set(failed)]


def rectangle(
    devices: Sequence[Any], height: int, width: int
) -> Shaped[np.ndarray, "height width"] | None:
    """Working devices as [height, width], neighbors in the machine; None if they have no plane.

    Raises:
      ValueError: they lie in a plane without such a rectangle; the message gives the largest.
    """
    plane = _plane(devices)
    if plane is None:
        return None
    for grid in (plane, plane.T):  # as it lies, or turned
        corner = _first_corner(_occupancy(grid), height, width)
        if corner is not None:
            return grid[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    best = _largest_in(_occupancy(plane))
    raise ValueError(_no_room(height, width, len(devices), best))


def check_enough(height: int, width: int, wafers: int, count: int, failed: int) -> None:
    """Raises ValueError if `count` working devices are too few, and gives the largest grid."""
    if height * width * wafers <= count:
        return
    best = largest_grid(count // wafers, height, width)
    raise ValueError(_no_room(height, width, count, best, wafers, failed))


def largest_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) with the most PEs of `count` devices, and about the shape wanted.

    Its sides' ratio is at most twice, and at least half, that of the grid wanted. Among grids with
    as many PEs, the one shaped most like it. (0, 0) if there is no device.
    """
    wanted = height / width
    candidates = [
        (h * w, -round(abs(np.log(h / w / wanted)), 6), w, (h, w))
        for h in range(1, count + 1)
        for w in (count // h,)
        if 0.5 <= h / w / wanted <= 2
    ]
    return max(candidates)[-1] if candidates else (min(count, 1), count)


def _plane(devices: Sequence[Any]) -> Shaped[np.ndarray, "rows columns"] | None:
    """The devices at their coordinates, None where one is missing; None if they have no plane."""
    coordinates = [getattr(device, "coords", None) for device in devices]
    if not coordinates or any(place is None for place in coordinates):
        return None
    at = np.array(coordinates, np.int64)
    at = at - at.min(0)
    flat = [d for d in range(at.shape[1]) if at[:, d].max() > 0]
    # Two cores of one chip share their coordinates.
    several = max(collections.Counter(map(tuple, at.tolist())).values()) > 1
    if len(flat) > 2 or several:
        return None
    first, second = (flat + [d for d in range(at.shape[1]) if d not in flat])[:2]
    grid = np.full(at[:, [first, second]].max(0) + 1, None, object)
    for device, place in zip(devices, at, strict=True):
        grid[place[first], place[second]] = device
    return grid


def _occupancy(grid: Shaped[np.ndarray, "rows columns"]) -> Bool[np.ndarray, "rows columns"]:
    return np.array([[device is not None for device in row] for row in grid], np.bool_)


def _first_corner(
    good: Bool[np.ndarray, "rows columns"], height: int, width: int
) -> tuple[int, int] | None:
    """The corner of the first rectangle of good places; None if there is none."""
    rows, columns = good.shape
    if height > rows or width > columns:
        return None
    # A table of sums over all rectangles from the origin: any other is a sum of four of them.
    sums = np.pad(good.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[height:, width:] - sums[:-height, width:]
    inside = inside - sums[height:, :-width] + sums[:-height, :-width]
    corners = np.argwhere(inside == height * width)
    return (int(corners[0][0]), int(corners[0][1])) if len(corners) else None


def _largest_in(good: Bool[np.ndarray, "rows columns"]) -> tuple[int, int]:
    sizes = [
        (h * w, (h, w))
        for h in range(1, good.shape[0] + 1)
        for w in range(1, good.shape[1] + 1)
        if _first_corner(good, h, w) is not None
    ]
    return max(sizes, default=(0, (0, 0)))[1]


def _no_room(
    height: int, width: int, count: int, best: tuple[int, int], wafers: int = 1, failed: int = 0
) -> str:
    times = "" if wafers == 1 else f"{wafers}x"
    left_out = f", {failed} left out as failed" if failed else ""
    offer = f"height={best[0]}, width={best[1]}" + ("" if wafers == 1 else f", wafers={wafers}")
    return (
        f"Wafer.devices: {times}{height}x{width} does not fit the {count} devices that work"
        f"{left_out}; the largest good grid is {times}{best[0]}x{best[1]}: "
        f"Wafer.devices({offer}, failed=...)"
    )
