"""The command `python -m models`; imports jax only after the number of devices is set."""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("python -m models")  # before slow imports

import math  # noqa: E402
import sys  # noqa: E402

from models.arguments import (  # noqa: E402
    Command,
    GenerateCommand,
    InfoCommand,
    PlanCommand,
    parse,
)
from wsekern.closed_pipe import end_on_closed_pipe  # noqa: E402
from wsekern.error_line import print_error  # noqa: E402
from wsekern.wafer.launch import parse_grid, prepare_devices  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Runs the command in `argv`; returns 0, or 2 if it is refused."""
    try:
        with end_on_closed_pipe():
            return _run(parse(argv))
    except (ValueError, OSError, ImportError) as error:
        print_error("python -m models", error)
        return 2


def _run(command: Command) -> int:
    if isinstance(command, GenerateCommand):
        devices = math.prod(parse_grid(command.wafer)) if command.wafer else 1
        prepare_devices(devices, command.platform, needed_by=f"wafer={command.wafer!r}")
    else:
        prepare_devices(1, "cpu")
    if isinstance(command, PlanCommand):
        from models.planning import report

        return report.run(command)
    from models import commands

    if isinstance(command, GenerateCommand):
        return commands.generate(command)
    return commands.info(command) if isinstance(command, InfoCommand) else commands.convert(command)


if __name__ == "__main__":
    sys.exit(main())
