"""The command `python -m models`; imports jax only after the number of devices is set."""

import math
import sys

from models.arguments import Command, GenerateCommand, InfoCommand, PlanCommand, parse
from wsekern.closed_pipe import end_on_closed_pipe
from wsekern.error_line import print_error
from wsekern.wafer.launch import parse_grid, prepare_devices


def main(argv: list[str] | None = None) -> int:
    """Runs the command in `argv`; returns 0, 2 if it is refused, or 130 if it is interrupted."""
    try:
        with end_on_closed_pipe():
            return _run(parse(argv))
    except (ValueError, OSError) as error:
        print_error("python -m models", error)
        return 2
    except KeyboardInterrupt:
        return 130


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
