"""The command `python -m serving`; imports jax only after the number of devices is set."""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    restore_interrupt = end_at_interrupt("python -m serving")  # before slow imports

import math  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402

from serving.arguments import parse  # noqa: E402
from serving.commands import dispatch  # noqa: E402
from wsekern.closed_pipe import end_on_closed_pipe  # noqa: E402
from wsekern.error_line import print_error  # noqa: E402
from wsekern.wafer.launch import parse_grid, prepare_devices  # noqa: E402

_SWITCH = 0.001  # seconds: how soon the engine's thread gets its turn from the HTTP interface


def main(
    argv: list[str] | None = None, restore_interrupt: Callable[[], None] = lambda: None
) -> int:
    """Serves as `argv` says, or runs another command that it begins with.

    Args:
      argv: the arguments; None: those of the process.
      restore_interrupt: undoes `end_at_interrupt`.

    Returns:
      The exit status: 0 after SIGTERM, 130 after Ctrl-C, 2 if it is refused, or 1 if an engine
      fails.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with end_on_closed_pipe():
            if dispatch.is_command(argv):
                return dispatch.run(argv, restore_interrupt)
            command = parse(argv)
            devices = math.prod(parse_grid(command.wafer)) if command.wafer else 1
            prepare_devices(devices, command.platform, needed_by=f"wafer={command.wafer!r}")
            from serving.loading import serve

            sys.setswitchinterval(_SWITCH)
            return serve(command)
    except (ValueError, OSError, ImportError) as error:
        print_error("python -m serving", error)
        return 2


if __name__ == "__main__":
    sys.exit(main(restore_interrupt=restore_interrupt))
