"""Keywords that JAX spells otherwise: an operation takes either name, and not two values.

The rule is the same everywhere. Our own name is the parameter that is documented; JAX's name for
the same thing is accepted beside it, as the last keyword, `None` unless it is given.
"""

from typing import TypeVar

T = TypeVar("T")


def either_name(what: str, ours: tuple[str, T], default: T, theirs: tuple[str, T | None]) -> T:
    """The value of a keyword that may be given by our name or by JAX's.

    Args:
      what: the operation, for the message.
      ours: our name and its value.
      default: the value of ours where nothing is given.
      theirs: JAX's name and its value, None where it is not given.

    Raises:
      ValueError: both are given, with different values.
    """
    (name, value), (alias, aliased) = ours, theirs
    if aliased is None:
        return value
    if value != default and value != aliased:
        raise ValueError(
            f"{what}: {name}={value!r} and {alias}={aliased!r} name one keyword twice; give one"
        )
    return aliased
