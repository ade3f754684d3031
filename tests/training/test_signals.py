"""Stopping a run by signals."""

import os
import signal
import threading

import pytest
from signaling import BUSY, READY, run_and_signal

from training.signals import KILLED, STOPPED, StopSignals


def test_a_signal_is_recorded_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_can_train_too():
    recorded = []

    def enter():
        with StopSignals() as signals:
            recorded.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert recorded == [None]


def test_a_second_ctrl_c_ends_the_process():
    script = (
        "import time\n"
        "from training.signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        if signals.received:\n"
        "            print('recorded', flush=True)\n"
    )
    twice = signal.SIGINT, signal.SIGINT
    status, errors = run_and_signal(script, *twice, lines=("ready", "recorded"))
    assert status == KILLED
    assert "Ctrl-C again ends at once" in errors


def run(script, *numbers):
    return run_and_signal(
        f"from training.signals import StopSignals, end_at_once\n{script}", *numbers
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_a_run_a_signal_ends_the_process_at_once(number):
    status, _ = run(f"end_at_once()\n{READY}{BUSY}", number)
    assert status == 128 + number


def test_before_a_run_that_can_be_resumed_the_status_says_so(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").touch()
    script = "import pathlib\nend_at_once()\n"
    script += f"end_at_once(pathlib.Path({str(tmp_path)!r}))\n{READY}{BUSY}"
    assert run(script, signal.SIGTERM)[0] == STOPPED


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_with_nothing_to_save_ends_at_once_though_python_runs_no_handler(number, resumable):
    script = (
        "end_at_once()\n"
        f"with StopSignals() as signals, signals.end_at_once('compiling', lambda: {resumable}):\n"
        f"    {READY}    {BUSY}"
    )
    status, errors = run(script, number)
    assert status == (STOPPED if resumable else 128 + number)
    rest = "go on with --resume" if resumable else "nothing was saved yet"
    assert f"stopped by {number.name} while compiling; {rest}" in errors


def test_a_signal_from_before_ends_that_work_as_it_begins():
    script = (
        "import time\nend_at_once()\n"
        f"with StopSignals() as signals:\n    {READY}"
        "    while not signals.received: time.sleep(0.01)\n"
        "    with signals.end_at_once('sampling', lambda: True):\n"
        f"        {BUSY}"
    )
    status, errors = run(script, signal.SIGTERM)
    assert status == STOPPED and "stopped by SIGTERM while sampling" in errors


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 0),  # a system that asks twice still gets its save
        ([signal.SIGTERM, signal.SIGINT], KILLED),
        ([signal.SIGINT, signal.SIGINT], KILLED),
    ],
)
def test_while_a_run_saves_only_ctrl_c_ends_it(numbers, status):
    save = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6)"
    script = f"end_at_once()\nwith StopSignals() as signals:\n    {READY}    {save}\n    {save}\n"
    assert run(script, *numbers)[0] == status


def test_nohup_is_respected():
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does\n"
    script += f"end_at_once()\nwith StopSignals() as signals:\n    {READY}"
    script += "    import time; time.sleep(0.3); assert signals.received is None"
    assert run(script, signal.SIGHUP)[0] == 0


def test_a_program_that_trains_is_not_ended():
    with StopSignals() as signals, signals.end_at_once("compiling", lambda: False):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
