"""The first argument chooses the command; help and clients load no jax."""

import subprocess
import sys

import pytest

from serving.__main__ import main
from serving.commands import dispatch

SCRIPT = """
import importlib, sys
import serving.__main__
from serving.commands import dispatch
for package, _ in dispatch.COMMANDS.values():
    importlib.import_module(f"{package}.run")
print("jax" in sys.modules)
"""


def test_help_names_the_other_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--model" in printed
    assert f"python -m serving {' | '.join(dispatch.COMMANDS)}" in printed


@pytest.mark.parametrize("command", dispatch.COMMANDS)
def test_each_command_has_a_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: python -m serving {command} " in capsys.readouterr().out


def test_the_commands_load_no_jax():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
