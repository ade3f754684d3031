"""The command `python -m models`; imports jax only after the number of devices is set."""

import os
import sys

from models.arguments import Command, GenerateCommand, InfoCommand, PlanCommand, parse
from wsekern.wafer.launch import emulate_devices, parse_grid


def main(argv: list[str] | None = None) -> int:
    """Runs the command in `argv`; returns 0, 2 if it is refused, or 130 if it is interrupted."""
    try:
        command = parse(argv)
        return _run(command)
    except (ValueError, OSError) as error:
        print(f"python -m models: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(command: Command) -> int:
    platform = command.platform if isinstance(command, GenerateCommand) else "cpu"
    if platform is not None:
        os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(platform, platform)
    if (
        isinstance(command, GenerateCommand)
        and command.wafer is not None
        and platform in (None, "cpu")
    ):
        wafers, height, width = parse_grid(command.wafer)
        emulate_devices(wafers * height * width)
    # XLA warns at length, for each layer, about reshapes that it could have done better.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if isinstance(command, PlanCommand):
        from models.planning import report

        return report.run(command)
    from models import commands

    if isinstance(command, GenerateCommand):
        return commands.generate(command)
    return commands.info(command) if isinstance(command, InfoCommand) else commands.convert(command)


if __name__ == "__main__":
    sys.exit(main())
