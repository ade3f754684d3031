"""Stopping a run by signals."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from training.signals import KILLED, StopSignals

ROOT = pathlib.Path(__file__).parents[2]


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
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        for line in ("ready\n", "recorded\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == KILLED
    assert "Ctrl-C again ends at once" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_a_run_a_signal_ends_the_process_at_once(number):
    script = (
        "import os, time\n"
        "from training.signals import end_at_once\n"
        "end_at_once()\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 128 + number
