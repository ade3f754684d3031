"""How the figures of an estimate are written."""

import jax
import jax.numpy as jnp
import pytest

import wsekern as wk
from wsekern.estimator.report import with_unit
from wsekern.hardware import ACCELERATORS


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"), (9.77e-12, "9.77 ps"), (5.71e-10, "571 ps"), (2.32e-6, "2.32 us"),
        (999.7e-6, "1 ms"), (37.8, "37.8 s"), (999.96, "1,000 s"), (1760.4, "1,760 s"),
    ],
)  # fmt: skip
def test_seconds_have_three_digits_and_no_kilo(value, text):
    assert with_unit(value, "s") == text
    assert with_unit(-value, "s").lstrip("-") == text


def test_other_units_have_every_prefix():
    said = [with_unit(1.5 * 1000.0**n, "B") for n in range(-4, 6)]
    assert said == [f"1.5 {prefix}B" for prefix in ["p", "n", "u", "m", "", *"kMGTP"]]


def test_only_chips_that_launch_kernels_say_how_many():
    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    e = wk.estimate(lambda x: x + 1.0, a, wafer=wk.Wafer.abstract(wk.WSE3, 4, 4), launches=9)
    lines = [line for line in str(e).splitlines() if "roofline" in line]
    assert len(lines) == len(ACCELERATORS)
    for line in lines:
        assert (", 9 launches" in line) == ("TPU" not in line)
