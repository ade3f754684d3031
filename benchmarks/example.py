"""This file is how a program of `examples/` is imported, where its parts are wanted."""

import importlib.util
import pathlib
import sys
from types import ModuleType

FOLDER = pathlib.Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """The module of `examples/NAME.py`, made anew; its `main` is not run."""
    sys.path.insert(0, str(FOLDER))  # where Python puts the folder of a script that it runs
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_example", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module
