"""Run the command that the first argument names; imports no jax, so that `--help` is quick."""

import importlib
from collections.abc import Callable, Sequence

import tyro

from serving.commands.http_client import Refused
from wsekern.error_line import print_error
from wsekern.interrupts import INTERRUPTED

# name -> the module and the class of its arguments; `run` beside it takes them
COMMANDS = {
    "bench": ("serving.commands.bench", "BenchCommand"),
    "chat": ("serving.commands.chat", "ChatCommand"),
    "soak": ("serving.commands.soak", "SoakCommand"),
}


def is_command(argv: Sequence[str]) -> bool:
    """Whether the first argument is one of these commands."""
    return bool(argv) and argv[0] in COMMANDS


def run(argv: Sequence[str], restore_interrupt: Callable[[], None]) -> int:
    """Runs a command; returns its exit status.

    Args:
      argv: the command and its flags.
      restore_interrupt: makes Ctrl-C raise KeyboardInterrupt; until then it ends the process.

    Raises:
      ValueError: an argument is wrong, or what it names.
      OSError: a server is not there, or a file cannot be written.
    """
    package, arguments = COMMANDS[argv[0]]
    program = f"python -m serving {argv[0]}"
    try:
        kind = getattr(importlib.import_module(f"{package}.arguments"), arguments)
        command = tyro.cli(kind, prog=program, args=argv[1:])
        module = importlib.import_module(f"{package}.run")
        return module.run(command, restore_interrupt)
    except KeyboardInterrupt:
        print_error(program, "interrupted")
        return INTERRUPTED
    except Refused as error:
        print_error(program, f"the server refuses a request: {error}")
    except (ValueError, OSError, ImportError) as error:
        print_error(program, error)
    return 2
