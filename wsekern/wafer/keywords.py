"""Keywords that JAX spells otherwise: an operation takes either name, but not two values.

Everywhere the documented parameter has this library's name. JAX's name for the same thing is
accepted beside it, as the last keyword, `None` by default.
"""

from typing import TypeVar

T = TypeVar("T")


def either_name(operation: str, own: tuple[str, T], default: T, alias: tuple[str, T | None]) -> T:
    """The value of a keyword that may be given by this library's name or by JAX's.

    Args:
      operation: its name, for the message.
      own: this library's keyword and its value.
      default: the value of that keyword when the caller gives none.
      alias: JAX's keyword and its value, None if it is not given.

    Raises:
      ValueError: both are given, with different values.
    """
    (name, value), (alias_name, alias_value) = own, alias
    if alias_value is None:
        return value
    if value != default and value != alias_value:
        raise ValueError(
            f"{operation}: {name}={value!r} and {alias_name}={alias_value!r} name one keyword "
            "twice; give one"
        )
    return alias_value
