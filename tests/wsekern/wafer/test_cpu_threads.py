"""The warning where emulated devices have too few threads."""

import os
import subprocess
import sys

import jax
import pytest

import wsekern as wk
from wsekern.wafer import cpu_threads

SETTINGS = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")


@pytest.fixture
def few_threads(monkeypatch):
    """As in a process whose sixteen devices were made without `emulate_devices`, on two cores."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.delenv("NPROC")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(cpu_threads, "_warned", False)
    monkeypatch.setattr(cpu_threads, "_threads_at_start", None)
    return monkeypatch


def test_devices_with_less_than_two_threads_each_warn_once(few_threads):
    with pytest.warns(
        RuntimeWarning, match="share 16 threads: .*wsekern.emulate_devices.16. before"
    ):
        wk.Wafer.devices(4, 4)
    wk.Wafer.devices(4, 4)  # filterwarnings = error: a second warning would be an error


def test_a_mesh_of_the_users_warns_too(few_threads):
    mesh = jax.make_mesh((4, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    with pytest.warns(RuntimeWarning, match="set NPROC=32 too"):
        wk.Wafer.of(mesh, y="a", x="b")


def test_devices_with_threads_enough_do_not_warn(few_threads):
    wk.Wafer.devices(2, 4)  # eight devices, and the backend has a thread for each of the sixteen
    few_threads.setenv("NPROC", "32")
    wk.Wafer.devices(4, 4)


def test_emulation_asked_for_too_late_warns(few_threads):
    with pytest.warns(RuntimeWarning, match="16 CPU devices share 16 threads"):
        wk.emulate_devices(16)
    # It has set NPROC for children by now, which does not help the backend that runs.
    few_threads.setattr(cpu_threads, "_warned", False)
    with pytest.warns(RuntimeWarning, match="16 CPU devices share 16 threads"):
        wk.Wafer.devices(4, 4)


WITHOUT = """
import os, warnings, jax
{before}
import wsekern as wk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    wk.Wafer.devices(2, {count} // 2)
    wk.Wafer.devices(1, {count})
print(len(caught), *[w.category.__name__ for w in caught])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "warned"),
    [
        ("jax.config.update('jax_num_cpu_devices', {count})", "1 RuntimeWarning"),
        (f"os.environ['XLA_FLAGS'] = '{cpu_threads.FLAG}={{count}}'", "1 RuntimeWarning"),
        ("import wsekern as wk; wk.emulate_devices({count})", "0"),
    ],
)
def test_devices_made_in_other_ways_warn(before, warned):
    count = 2 * ((os.cpu_count() or 1) // 2 + 1)  # more than half as many threads as they need
    script = WITHOUT.format(before=before.format(count=count), count=count)
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = {**others, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert run.stdout.strip() == warned, run.stderr
