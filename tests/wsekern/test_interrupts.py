"""Ctrl-C ends a command at once, whatever it does."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from wsekern.interrupts import INTERRUPTED, end_at_interrupt

ROOT = pathlib.Path(__file__).parents[2]
# Inside one call into C, as inside XLA, Python runs no handler.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"
# Some libraries catch whatever comes while they are imported.
SWALLOWS = """
while True:
    try:
        while True: pass
    except BaseException: pass
"""


@pytest.mark.parametrize("busy", [BUSY, SWALLOWS], ids=["in C", "swallows"])
def test_a_command_ends_at_once_with_one_line_and_no_half_written_file(busy, tmp_path):
    script = (
        "import sys\n"
        "from wsekern.interrupts import end_at_interrupt\n"
        "from wsekern.atomic_write import atomic_write\n"
        "end_at_interrupt('a command')\n"
        f"with atomic_write({str(tmp_path / 'x')!r}) as file:\n"
        f"  file.write(b'half')\n  file.flush()\n  print('ready', flush=True)\n  exec({busy!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED and errors == "a command: interrupted\n"
    assert time.monotonic() - begun < 5 and not list(tmp_path.iterdir())


def test_afterwards_ctrl_c_is_an_exception_again():
    before = signal.getsignal(signal.SIGINT)
    end_at_interrupt("a command")()
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_an_interrupt_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_at_interrupt("a command")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
