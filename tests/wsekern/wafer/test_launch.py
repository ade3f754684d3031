"""Emulated devices, the grid in text, and the choice of a platform."""

import os
import subprocess
import sys

import jax
import pytest

import wsekern as wk
from wsekern.wafer.launch import (
    emulate_devices,
    find_devices,
    make_wafer,
    parse_grid,
    parse_height_width,
    prepare_devices,
)

FLAG = "--xla_force_host_platform_device_count"
VARIABLES = ("XLA_FLAGS", "NPROC", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")


@pytest.fixture
def before_jax(monkeypatch):
    """As in a process that has not imported jax, with neither variable set."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in VARIABLES[:2]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def settings():
    return os.environ["XLA_FLAGS"], os.environ["NPROC"]


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_no_devices(count):
    with pytest.raises(ValueError, match=f"count is {count}, it must be 1 or more"):
        emulate_devices(count)


def test_devices_get_two_threads_each(before_jax):
    emulate_devices(8)
    assert settings() == (f"{FLAG}=8", "16")


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (f"--xla_dump_to=dumps {FLAG}=4 --xla_cpu_foo=1", "--xla_dump_to=dumps --xla_cpu_foo=1"),
        (f"{FLAG}=2 {FLAG}=4 --a", "--a"),
        ("--a --b", "--a --b"),
    ],
)
def test_other_flags_stay_and_the_old_count_goes(before_jax, flags, kept):
    before_jax.setenv("XLA_FLAGS", flags)
    emulate_devices(8)
    assert settings()[0] == f"{kept} {FLAG}=8"


@pytest.mark.parametrize(("set_before", "threads"), [("3", "16"), ("40", "40"), ("", "16")])
def test_more_threads_than_needed_stay(before_jax, set_before, threads):
    before_jax.setenv("NPROC", set_before)
    emulate_devices(8)
    assert settings()[1] == threads


def test_more_devices_asked_for_before_stay(before_jax):
    emulate_devices(8)
    emulate_devices(4)
    assert settings() == (f"{FLAG}=8", "16")


def fresh(script, timeout=60):
    """What `script` prints in a new interpreter, where jax has CPUs only and no cache."""
    code = f"import os\nfor name in {VARIABLES}: os.environ.pop(name, None)\n"
    code += "os.environ['JAX_PLATFORMS'] = 'cpu'\nfrom wsekern import emulate_devices\n"
    run = subprocess.run(
        [sys.executable, "-c", code + script], capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "order", ["emulate_devices(6); import jax", "import jax; emulate_devices(6)"]
)
def test_jax_has_as_many_devices_before_and_after_its_import(order):
    assert fresh(f"{order}; print(jax.device_count())") == "6"


TOO_LATE = """
import jax
emulate_devices(3)
jax.devices()
emulate_devices(2)
emulate_devices(3)
print(jax.device_count())
try:
    emulate_devices(4)
except RuntimeError as error:
    print(error)
"""


def test_once_jax_has_started_fewer_devices_are_fine_and_more_are_refused():
    count, message = fresh(TOO_LATE).splitlines()
    assert count == "3"
    assert message == (
        "emulate_devices: 4 CPU devices are needed, but jax has already started with 3; call "
        "wsekern.emulate_devices(4) before the first array or jax.devices(), or start with "
        f"XLA_FLAGS={FLAG}=4 NPROC=8 set"
    )


IN_FLIGHT = """
emulate_devices(8)
import jax
from jax.sharding import PartitionSpec as P
import wsekern as wk
from wsekern import fabric
mean = wk.Wafer.devices(2, 4).map(
    lambda u: fabric.varying(fabric.all_reduce(u, ("y", "x"), "mean")) + u,
    in_specs=P("y", "x"), out_specs=P("y", "x"),
)
step = jax.jit(lambda u: mean(u) / 2)
u = jax.numpy.ones((64, 64))
for _ in range(300):
    u = step(u)
print(float(u.sum()))
"""


@pytest.mark.slow
def test_hundreds_of_calls_in_flight_finish():
    """With fewer threads than two a device, jax 0.10 hangs here for ever."""
    assert fresh(IN_FLIGHT, timeout=120) == "4096.0"


def test_a_smaller_count_in_the_environment_does_not_win():
    script = "os.environ['JAX_NUM_CPU_DEVICES'] = '4'; emulate_devices(6); import jax"
    assert fresh(f"{script}; print(jax.device_count())") == "6"


@pytest.mark.parametrize(("text", "grid"), [("2x4", (1, 2, 4)), ("3x2X1", (3, 2, 1))])
def test_a_grid_is_read_with_wafers_first(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["2", "2x", "x4", "2x4x1x1", "2x-4", "2x4.0", "two", "2x²"])
def test_a_malformed_grid_is_refused(text):
    with pytest.raises(ValueError, match="write HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH"):
        parse_grid(text)


def test_a_grid_of_one_wafer_is_read_as_height_and_width():
    assert parse_height_width("2x14") == (2, 14)


@pytest.mark.parametrize("text", ["2", "2x", "x4", "0x4", "2x-4", "axb", "2x2x4"])
def test_what_is_not_height_and_width_is_refused(text):
    with pytest.raises(ValueError, match="is not HEIGHTxWIDTH, as in 2x4"):
        parse_height_width(text)


def test_devices_are_emulated_where_the_cpu_may_be_used(before_jax):
    before_jax.setenv("JAX_PLATFORMS", "cuda")
    prepare_devices(8)
    assert "XLA_FLAGS" not in os.environ
    prepare_devices(8, "cpu")
    assert os.environ["JAX_PLATFORMS"] == "cpu" and settings() == (f"{FLAG}=8", "16")


def test_an_accelerator_asked_for_is_not_hidden_by_the_environment(before_jax):
    before_jax.setenv("JAX_PLATFORMS", "cpu")
    prepare_devices(8, "gpu")
    assert "JAX_PLATFORMS" not in os.environ and "XLA_FLAGS" not in os.environ


def test_more_devices_than_can_be_emulated_are_refused_by_name(before_jax):
    message = "wafer='64x64' needs 4096 devices, but no more than 1024 .* or --virtual"
    with pytest.raises(ValueError, match=message):
        prepare_devices(4096, "cpu", needed_by="wafer='64x64'")


def test_preparing_for_fewer_devices_leaves_those_that_there_are():
    before = jax.devices()
    prepare_devices(2)
    assert jax.devices() == before


def test_the_wafer_is_the_one_that_the_flags_name():
    assert make_wafer("2x2x4") == wk.Wafer.devices(height=2, width=4, wafers=2)


def test_a_virtual_wafer_needs_one_device():
    wafer = make_wafer("40x50", virtual=True)
    assert (wafer.backend, wafer.height, wafer.width) == ("virtual", 40, 50)


def test_too_few_devices_are_refused_with_the_mend():
    with pytest.raises(ValueError, match="'4x8' needs 32 devices, there are 16.*smaller --wafer"):
        make_wafer("4x8")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_platform_that_is_not_there_is_refused_by_name(platform):
    for start in (find_devices, lambda platform: make_wafer("1x1", platform)):
        with pytest.raises(ValueError, match=f"platform='{platform}' cannot be used here"):
            start(platform)
