"""This file is which devices make a grid when some have failed, and the largest grid that is left.

Devices that have coordinates in a plane, TPUs, are taken from a rectangle of it without a failed
one, so that neighbors in the grid are neighbors in the machine; all others talk to each other
alike, and any that work will do.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np


def working(devices: Sequence[Any], failed: Collection[int]) -> list[Any]:
    """`devices` without those whose ids are in `failed`.

    Raises:
      ValueError: an id is none of theirs.
    """
    ids = [device.id for device in devices]
    strangers = sorted(set(failed) - set(ids))
    if strangers:
        raise ValueError(
            f"Wafer.devices: failed={sorted(failed)} names {strangers}, which are no devices here; "
            f"their ids are {sorted(ids)}"
        )
    return [device for device in devices if device.id not in set(failed)]


def rectangle(devices: Sequence[Any], height: int, width: int) -> np.ndarray | None:
    """Working devices as [height, width], neighbors in the machine; None where no plane says so.

    Raises:
      ValueError: they lie in a plane, of which no such rectangle works; says the largest.
    """
    plane = _plane(devices)
    if plane is None:
        return None
    for turned in (False, True):
        grid = plane.T if turned else plane
        good = _there(grid)
        corner = _corner(good, height, width)
        if corner is not None:
            return grid[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    best = _largest_in(_there(plane))
    raise ValueError(_no_room(height, width, len(devices), best))


def check_enough(height: int, width: int, wafers: int, count: int, failed: int) -> None:
    """Raises ValueError where `count` working devices are too few, and says the largest grid."""
    if height * width * wafers <= count:
        return
    best = largest_grid(count // wafers, height, width)
    raise ValueError(_no_room(height, width, count, best, wafers, failed))


def largest_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """The most PEs of a grid of `count` devices, no more than twice as long as the one wanted.

    Of several that have as many, the one shaped most like it; (0, 0) where there is none.
    """
    wanted = height / width
    found = [
        (h * w, -round(abs(np.log(h / w / wanted)), 6), w, (h, w))
        for h in range(1, count + 1)
        for w in (count // h,)
        if 0.5 <= h / w / wanted <= 2
    ]
    return max(found)[-1] if found else (min(count, 1), count)


def _plane(devices: Sequence[Any]) -> np.ndarray | None:
    """The devices by their place, None where one is missing; None where they have no plane."""
    places = [getattr(device, "coords", None) for device in devices]
    if not places or any(place is None for place in places):
        return None
    at = np.array(places, np.int64)
    at = at - at.min(0)
    flat = [d for d in range(at.shape[1]) if at[:, d].max() > 0]
    several = max(collections.Counter(map(tuple, at.tolist())).values()) > 1  # cores of one chip
    if len(flat) > 2 or several:
        return None
    first, second = (flat + [d for d in range(at.shape[1]) if d not in flat])[:2]
    grid = np.full(at[:, [first, second]].max(0) + 1, None, object)
    for device, place in zip(devices, at, strict=True):
        grid[place[first], place[second]] = device
    return grid


def _there(grid: np.ndarray) -> np.ndarray:
    return np.array([[device is not None for device in row] for row in grid], np.bool_)


def _corner(good: np.ndarray, height: int, width: int) -> tuple[int, int] | None:
    """Where a rectangle of good places begins, the first one; None where there is none."""
    rows, columns = good.shape
    if height > rows or width > columns:
        return None
    whole = np.pad(good.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = whole[height:, width:] - whole[:-height, width:]
    inside = inside - whole[height:, :-width] + whole[:-height, :-width]
    found = np.argwhere(inside == height * width)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def _largest_in(good: np.ndarray) -> tuple[int, int]:
    sizes = [
        (h * w, (h, w))
        for h in range(1, good.shape[0] + 1)
        for w in range(1, good.shape[1] + 1)
        if _corner(good, h, w) is not None
    ]
    return max(sizes, default=(0, (0, 0)))[1]


def _no_room(
    height: int, width: int, count: int, best: tuple[int, int], wafers: int = 1, failed: int = 0
) -> str:
    times = "" if wafers == 1 else f"{wafers}x"
    told = f", {failed} left out as failed" if failed else ""
    offer = f"height={best[0]}, width={best[1]}" + ("" if wafers == 1 else f", wafers={wafers}")
    return (
        f"Wafer.devices: {times}{height}x{width} does not fit the {count} devices that work{told}; "
        f"the largest good grid is {times}{best[0]}x{best[1]}: Wafer.devices({offer}, failed=...)"
    )
