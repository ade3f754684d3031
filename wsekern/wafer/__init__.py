"""The wafer: which PEs there are, and how a kernel becomes a program on them.

Imports `wsekern.hardware` alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer as Wafer


def __getattr__(name: str) -> Any:
    if name != "Wafer":  # loaded when first used: launch.py must run before jax is imported
        raise AttributeError(f"module 'wsekern.wafer' has no attribute {name!r}")
    from wsekern.wafer.wafer import Wafer

    return Wafer
