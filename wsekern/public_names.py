"""Load a package's public names when they are first used, so that its import stays light (PEP 562).

Type checkers and editors cannot follow a table of strings, so a package also imports its names
under `TYPE_CHECKING`. tests/test_floors.py holds the two lists to each other.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package.

        __getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)

    Args:
      package: its `__name__`.
      homes: each public name, and the module below the package that defines it.
      modules: each public name that is itself a module below the package, and that module.
    """
    modules = modules or {}
    names = sorted({*homes, *modules})

    def load(name: str) -> Any:
        if name in modules:
            value: Any = importlib.import_module(f"{package}.{modules[name]}")
        elif name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    return load, lambda: names, names
