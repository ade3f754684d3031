"""The wafers that every move is tested on, virtual PEs spread over devices among them."""

import pytest

import wsekern as wk

# name -> height, width, wafers; devices
SPREAD = {"spread-4x4": ((4, 4, 1), (2, 2)), "spread-2of2x4": ((2, 4, 2), (2, 1, 2))}


@pytest.fixture(params=["2x4", "2of2x2", "virtual-4x4", *SPREAD])
def full_wafer(request, wafer_called):
    """Wafers whose every axis has more than one PE."""
    if request.param not in SPREAD:
        return wafer_called(request.param)
    shape, devices = SPREAD[request.param]
    return wk.Wafer.virtual(wk.WSE2, *shape, devices=devices)
