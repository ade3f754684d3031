"""Import a program of `examples/`, for the benchmarks and tests that use parts of it."""

import importlib.util
import pathlib
import sys
from types import ModuleType

FOLDER = pathlib.Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """The module of `examples/NAME.py`, imported afresh; its `main` is not run."""
    # Python does so with the folder of a script that it runs: examples import their neighbors.
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_example", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module
