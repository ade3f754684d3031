"""A command whose reader has gone ends without a word."""

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "wsekern estimate": "from wsekern.cli import main; main(['estimate', 'examples/own_kernel.py:"
    "plain', '--grid', '2x2', '--shapes', '8x8:float32'])",
    "wsekern": "from wsekern.cli import main; main(['info'])",
    "benchmarks": "from benchmarks.__main__ import main; main([])",
    "models": "from models.__main__ import main; main(['info', '--model', 'llama3-8b'])",
    "models --help": "from models.__main__ import main; main(['generate', '--help'])",
    "training --help": "from training.__main__ import main; main(['--help'])",
    "example": "from benchmarks.example import example; import sys; sys.argv = ['x', '--help']\n"
    "heat = example('heat'); heat.run(heat.main)",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_ends_quietly(command):
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", COMMANDS[command]]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
