"""This file is what every test starts from: sixteen CPU devices, made before jax starts."""

import os
import pathlib

from wsekern.emulation import emulate_devices

emulate_devices(16)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept between runs: compiling is most of the suite's time.
_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

import wsekern as wk  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# name -> (reading, height, width, wafers)
GRIDS = {
    "1x1": ("devices", 1, 1, 1),
    "1x4": ("devices", 1, 4, 1),
    "4x1": ("devices", 4, 1, 1),
    "2x2": ("devices", 2, 2, 1),
    "3x3": ("devices", 3, 3, 1),
    "2x4": ("devices", 2, 4, 1),
    "4x2": ("devices", 4, 2, 1),
    "4x4": ("devices", 4, 4, 1),
    "2of2x2": ("devices", 2, 2, 2),
    "virtual-2x4": ("virtual", 2, 4, 1),
    "virtual-4x4": ("virtual", 4, 4, 1),
    "virtual-8x8": ("virtual", 8, 8, 1),
    "virtual-2of2x2": ("virtual", 2, 2, 2),
}


def make_wafer(name: str) -> wk.Wafer:
    """The wafer that tests call `name`."""
    reading, height, width, wafers = GRIDS[name]
    if reading == "virtual":
        return wk.Wafer.virtual(wk.WSE2, height, width, wafers)
    return wk.Wafer.devices(height, width, wafers)


@pytest.fixture
def wafer_called():
    """Makes the wafer of a name in `GRIDS`."""
    return make_wafer


EVERY_KIND = ["1x1", "1x4", "4x1", "2x2", "2x4", "4x4", "2of2x2", "virtual-4x4", "virtual-8x8"]


@pytest.fixture(params=EVERY_KIND)
def wafer(request):
    """Every kind of wafer; for results, of one shape."""
    return make_wafer(request.param)


@pytest.fixture(params=["2x4", "2of2x2", "virtual-4x4"])
def full_wafer(request):
    """Wafers whose every axis has more than one PE; for gradients and random shapes."""
    return make_wafer(request.param)


@pytest.fixture(params=["2x2", "4x4", "virtual-4x4"])
def square_wafer(request):
    """Square grids, for algorithms that need one."""
    return make_wafer(request.param)
