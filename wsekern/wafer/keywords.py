"""Keywords that JAX spells otherwise: an operation takes either name, but not two values.

Everywhere the documented keyword has this library's name. JAX's name for the same thing is accepted
beside it, as the last keyword, `None` by default. Operands (`q`, `operator`) have one name only:
they are given by position.
"""

import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Requirement(NamedTuple):
    """What a keyword's value must be."""

    holds: Callable[[Any], bool]
    must_be: str  # as in "1 or more", for the message


def accept_jax_names(
    operation: str, requirements: Mapping[str, Requirement] | None = None, **names: str
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """The decorator that hands what is given by JAX's name to the keyword of this library's.

    The function declares both, so that `help` and editors show them, and reads its own only. What
    was given is decided here, where a default that is given can be told from one that is not.
    Values are checked here too, so that a message has the name that was typed.

    Args:
      operation: its name, for the message.
      requirements: by this library's keyword, what a value that is given must be.
      names: this library's keyword by JAX's, as in `tol="tolerance"`.

    Raises:
      ValueError: in a call, both names are given, with different values, or a value is not what it
        must be. None counts as not given.
    """
    required = requirements or {}

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for jax_name, name in names.items():
                typed = {key: kwargs.pop(key) for key in (name, jax_name) if key in kwargs}
                typed = {key: value for key, value in typed.items() if value is not None}
                for key, value in typed.items():
                    if name in required and not required[name].holds(value):
                        raise ValueError(
                            f"{operation}: {key}={reprlib.repr(value)} must be "
                            f"{required[name].must_be}"
                        )
                if len(typed) == 2 and typed[name] != typed[jax_name]:
                    raise ValueError(
                        f"{operation}: {name}={typed[name]!r} and {jax_name}={typed[jax_name]!r} "
                        "name one keyword twice; give one"
                    )
                for value in typed.values():
                    kwargs[name] = value
            return function(*args, **kwargs)

        return call

    return decorate
