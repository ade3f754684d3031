"""Sixteen CPU devices, made before jax starts, and the wafers that tests run on."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import signal

from wsekern.wafer.launch import emulate_devices

# Tests compile their programs unoptimized and, in jax 0.10, without the emitters that go through
# MLIR, which takes a fifth of the time. jax 0.12 has only those emitters; CI runs both versions.
_QUICKLY: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
_AS_SHIPPED: dict[str, bool | int] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _QUICKLY |= {"xla_cpu_use_fusion_emitters": False}
    _AS_SHIPPED |= {"xla_cpu_use_fusion_emitters": True}
if not os.environ.get("XLA_AS_SHIPPED"):  # set it to compile as users do
    _GIVEN = os.environ.get("XLA_FLAGS", "")
    _FLAGS = [f"--{name}={str(v).lower()}" for name, v in _QUICKLY.items() if name not in _GIVEN]
    os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, _GIVEN]).strip()
emulate_devices(16)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept between runs, and between checkouts: compiling is most of the time.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wsekern"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

# What a shell starts in the background ignores Ctrl-C; tests that send it must not inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many small objects that live on: looking for garbage less often saves a tenth.
gc.set_threshold(200_000, 20, 50)

import jax  # noqa: E402
import pytest  # noqa: E402

import wsekern as wk  # noqa: E402
from wsekern.wafer.topology import kept_out_of_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# name -> (backend, height, width, wafers)
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
    backend, height, width, wafers = GRIDS[name]
    if backend == "virtual":
        return wk.Wafer.virtual(wk.WSE2, height, width, wafers)
    return wk.Wafer.devices(height, width, wafers)


# Parameters that say where and how large, not what: `--one-of-each` takes one value of them.
_PLACES = {"wafer", "full_wafer", "square_wafer", "odd_wafer", "wafer_24", "grid", "shape"}
_PLACES |= {"shapes", "sizes", "batch", "odd", "rows", "x", "words", "width", "root", "P", "B"}
_PLACES |= {"operands"}


def pytest_addoption(parser):
    parser.addoption(
        "--one-of-each",
        action="store_true",
        help="of each test and algorithm, one shape on one grid; every other one on virtual PEs",
    )


def pytest_collection_modifyitems(config, items):
    if importlib.util.find_spec("libtpu") is None:
        for item in items:
            if item.get_closest_marker("tpu"):
                item.add_marker(pytest.mark.skip(reason="needs libtpu: the extra tpu"))
    if not config.getoption("--one-of-each"):
        return
    candidates: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        kind = [(n, _without_grid(value)) for n, value in values.items() if n not in _PLACES]
        candidates.setdefault((item.nodeid.partition("[")[0], *kind), []).append(item)
    # Of a test's algorithms one is tried on devices and the next on virtual PEs, so each family of
    # kernels meets both. Of the grids, 2x4 has several PEs along both axes, told apart by length.
    kept = {
        max(several, key=lambda item: (("virtual" in item.name) == virtual, "2x4" in item.name))
        for several, virtual in zip(candidates.values(), itertools.cycle([False, True]))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _without_grid(value: object) -> str:
    """`value` as text; of `("cannon", "2x4")` what is left without the grid."""
    parts = value if isinstance(value, tuple) else (value,)
    return str([part for part in parts if not (isinstance(part, str) and part in GRIDS)])


@pytest.fixture
def quick_collection():
    """Lets `gc.collect` look only at what the test makes, not at a worker's millions of objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def absent_chips_stay_out_of_the_cache(request):
    """JAX's cache on disk would keep a program for them, and could not read it again."""
    compiles = request.node.get_closest_marker("tpu") is not None
    with kept_out_of_cache() if compiles else contextlib.nullcontext():
        yield


@pytest.fixture
def wafer_called():
    """Makes the wafer of a name in `GRIDS`."""
    return make_wafer


@pytest.fixture
def as_shipped():
    """Options for `compile`, for a test of the program that users get."""
    return _AS_SHIPPED


# 2x2 is the two wafers' grid, and 2x4's columns; `full_wafer` has a virtual 4x4.
EVERY_KIND = ["1x1", "1x4", "4x1", "2x4", "4x4", "2of2x2", "virtual-8x8"]


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
