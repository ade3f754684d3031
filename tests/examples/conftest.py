"""Run the examples as a user does, but in this process."""

import sys

import pytest

from benchmarks.example import example


@pytest.fixture(scope="session")
def example_called():
    """Imports the example of a name."""
    return example


@pytest.fixture
def run(monkeypatch):
    """Runs an example's `main` with flags."""

    def main(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
        module.run(module.main)

    return main
