"""This file is the command `python -m training`; it imports jax only once the devices are made."""

from training.signals import KILLED, STOPPED, end_at_once

if __name__ == "__main__":
    end_at_once()  # before what is slow to import, and swallows a KeyboardInterrupt now and then

import io  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from training.config import parse  # noqa: E402
from wsekern.wafer.launch import prepare_devices  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Trains as `argv` says; an exit status: 0; 1 diverged or unsaved; 2 refused; 75; 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know all that a model writes
    config = parse(argv)
    try:
        prepare_devices(config.devices, config.platform, needed_by=f"wafer={config.wafer!r}")
        from training.loop import Diverged
        from training.trainer import Trainer

        try:
            result = Trainer(config).fit()
        except Diverged as error:
            return _say(error, 1)
    except (ValueError, OSError) as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return KILLED
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written was said in vain, but is no failure of the run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not result.saved:
        return _say("the last step could not be saved; the lines above say why", 1)
    return STOPPED if result.stopped else 0


def _say(error: object, status: int) -> int:
    print(f"python -m training: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
