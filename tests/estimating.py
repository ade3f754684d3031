"""What tests of estimates share: operands by their shapes, and a small wafer."""

import jax
import jax.numpy as jnp

import wsekern as wk


def array(*shape, dtype=jnp.float32):
    """An operand of which an estimate sees shape and dtype alone."""
    return jax.ShapeDtypeStruct(shape, dtype)


def wafer(height=8, width=8):
    """A few PEs of WSE-2."""
    return wk.Wafer.abstract(wk.WSE2, height, width)


def estimate(function, *operands):
    """The estimate on 8 x 8 PEs."""
    return wk.estimate(function, *operands, wafer=wafer())
