"""Keywords that JAX spells otherwise: an operation takes either name, but not two values.

Everywhere the documented parameter has this library's name. JAX's name for the same thing is
accepted beside it, as the last keyword, `None` by default.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def accept_jax_names(
    operation: str, **names: str
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """The decorator that hands what is given by JAX's name to the keyword of this library's.

    The function declares both, so that `help` and editors show them, and reads its own only. What
    was given is decided here, where a default that is given can be told from one that is not.

    Args:
      operation: its name, for the message.
      names: this library's keyword by JAX's, as in `tol="tolerance"`.

    Raises:
      ValueError: in a call, both names are given, with different values. None counts as not given.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for jax_name, name in names.items():
                jax_value, value = kwargs.pop(jax_name, None), kwargs.get(name)
                if jax_value is None:
                    continue
                if value is not None and value != jax_value:
                    raise ValueError(
                        f"{operation}: {name}={value!r} and {jax_name}={jax_value!r} name one "
                        "keyword twice; give one"
                    )
                kwargs[name] = jax_value
            return function(*args, **kwargs)

        return call

    return decorate
