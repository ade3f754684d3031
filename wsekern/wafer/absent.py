"""What a wafer without devices answers if it is asked to compute."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer


def never_runs(wafer: "Wafer", operation: str) -> ValueError:
    """The error to raise if a wafer that has no devices is asked to compute."""
    if wafer.compile_only:
        return ValueError(
            f"{operation}: the chips of {wafer} are not there, so that programs are compiled for "
            "it and never run; see wsekern.compile, or run on a wafer of Wafer.devices"
        )
    return ValueError(
        f"{operation}: {wafer} is only traced over, never run on; use jax.eval_shape or "
        "jax.make_jaxpr, or a virtual wafer to compute"
    )


def check_only_traced(wafer: "Wafer") -> None:
    """Refuses to compute, outside of any trace, for chips that are not there.

    An operation that is plain array code would run on the host, as if it were the chip.

    Raises:
      ValueError: the wafer's chips are not there, and nothing is being traced.
    """
    if wafer.compile_only and not isinstance(jnp.zeros(()), jax.core.Tracer):
        raise never_runs(wafer, "an operation outside of jax.jit")
