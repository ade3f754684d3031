"""Ctrl-C ends a command at once, whatever it does."""

import os
import signal
import time

import pytest
from signaling import BUSY, READY, run_and_signal

from wsekern.interrupts import INTERRUPTED, end_at_interrupt

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
        f"  file.write(b'half')\n  file.flush()\n  {READY}  exec({busy!r})\n"
    )
    status, errors = run_and_signal(script, signal.SIGINT, within=5)
    assert status == INTERRUPTED and errors == "a command: interrupted\n"
    assert not list(tmp_path.iterdir())


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
