import os
import subprocess
import sys

import pytest

from wsekern.wafer.launch import emulate_devices

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
    ("given", "kept"),
    [
        (f"--xla_dump_to=dumps {FLAG}=4 --xla_cpu_foo=1", "--xla_dump_to=dumps --xla_cpu_foo=1"),
        (f"{FLAG}=2 {FLAG}=4 --a", "--a"),
        ("--a --b", "--a --b"),
    ],
)
def test_other_flags_stay_and_the_old_count_goes(before_jax, given, kept):
    before_jax.setenv("XLA_FLAGS", given)
    emulate_devices(8)
    assert settings()[0] == f"{kept} {FLAG}=8"


@pytest.mark.parametrize(("given", "threads"), [("3", "16"), ("40", "40"), ("", "16")])
def test_more_threads_than_needed_stay(before_jax, given, threads):
    before_jax.setenv("NPROC", given)
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
