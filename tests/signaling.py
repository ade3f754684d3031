"""Scripts that get signals: what tests of Ctrl-C and of stopped runs share."""

import itertools
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# Inside one call into C, as inside XLA, Python runs no handler.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)\n"
READY = "print('ready', flush=True)\n"


def run_and_signal(script, *numbers, within=30, lines=("ready",)):
    """The status and the errors of a script that gets signals once it says "ready".

    Args:
      script: a program.
      numbers: of the signals, one after another.
      within: seconds from the last signal in which the script has to end.
      lines: what the script prints before it gets each of the first signals.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line, number in itertools.zip_longest(lines, numbers):
            if line is None:
                time.sleep(0.1)  # equal signals would else be one
            else:
                assert process.stdout.readline() == f"{line}\n"
            process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=within)
        finally:
            process.kill()  # if it has not ended
    return process.returncode, errors
