"""Scripts that get signals: what tests of Ctrl-C and of stopped runs share."""

import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
# Inside one call into C, as inside XLA, Python runs no handler.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)\n"
READY = "print('ready', flush=True)\n"


def run_and_signal(script, *numbers, within=30):
    """The status and the errors of a script that gets signals once it says "ready".

    Args:
      script: a program, which prints a line "ready".
      numbers: of the signals, one after another.
      within: seconds from the last signal in which the script has to end.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for place, number in enumerate(numbers):
            time.sleep(0.1 * (place > 0))  # equal signals would else be one
            process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=within)
        finally:
            process.kill()  # if it has not ended
    return process.returncode, errors
