"""Scans outside kernels: rows that lie on PEs of their own are laid out anew, once."""

import jax
import jax.numpy as jnp
import pytest
from estimating import array, estimate, wafer
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk

T, D = 160, 240  # rows of as many elements, over 8 x 8 PEs
MIDDLE = 2 * 8  # links that cross the middle of the wafer, both ways
SCAN = "scan as a relayout"


def total(x):
    return lax.scan(lambda c, row: (c + row, None), jnp.zeros(x.shape[1:]), x)[0]


def running(c):
    return lax.scan(lambda c, _: (c * 1.1, c), c, None, length=T)[1]


def test_scanned_rows_are_laid_out_once():
    """All words cross the middle before the first trip; the trips themselves move none."""
    e = estimate(total, array(T, D))
    assert e.moves == 1 and max(e.words.values()) == T * D / MIDDLE
    assert e.cycles > T * D / MIDDLE and list(e.assumed) == [SCAN]
    assert e.assumed[SCAN].startswith("test_scans.py")
    longer = estimate(total, array(10 * T, D))
    assert longer.moves == 1 and max(longer.words.values()) == 10 * T * D / MIDDLE


def test_rows_of_few_elements_take_the_ramps_of_few_pes():
    """[4096, 20] lies on 20 PEs afterwards, each of which takes 4096 words through one ramp."""
    e = wk.estimate(total, array(4096, 20), wafer=wafer(32, 32))
    assert max(e.words.values()) == 4096
    # Rows of two elements go to every PE.
    assert max(estimate(total, array(4096, 2)).words.values()) >= 2 * 4096


@pytest.mark.parametrize("shape", [(12, 64, 64), (12, 3, 64, 64)], ids=str)
def test_layers_weights_stay_where_they_are(shape):
    e = estimate(total, array(*shape))
    assert not e.moves and not e.assumed


def test_stacked_rows_lie_as_the_trips_left_them():
    """At the program's end they are laid out; a sum of all rows finds them on its PE."""
    e = estimate(running, array(D))
    assert e.moves == 1 and max(e.words.values()) == T * D / MIDDLE and SCAN in e.assumed
    assert estimate(lambda c: running(c) * 2.0, array(D)).moves == 1
    assert not estimate(lambda c: running(c).sum(0), array(D)).moves
    assert estimate(lambda c: running(c).sum(1), array(D)).moves == 1
    assert not estimate(lambda c: total(running(c)), array(D)).moves  # as a gradient reads them


def test_a_kernel_pays_for_the_layout_of_stacked_rows():
    w = wafer()
    tiled = w.map(lambda t: t * 2.0, in_specs=P("y", "x"), out_specs=P("y", "x"))
    e = wk.estimate(lambda c: tiled(running(c)), array(D), wafer=w)
    assert e.moves == 1 and max(e.words.values()) == T * D / MIDDLE


def test_a_known_layout_counts_and_is_not_assumed():
    w = wafer()
    tiled = w.map(lambda t: t * 2.0, in_specs=P("y", "x"), out_specs=P("y", "x"))
    e = wk.estimate(lambda x: total(tiled(x)), array(T, D), wafer=w)
    assert e.moves == 1 and SCAN not in e.assumed
    whole = w.map(lambda t: t * 2.0, in_specs=P(None, "x"), out_specs=P(None, "x"))
    assert not wk.estimate(lambda x: total(whole(x)), array(T, D), wafer=w).moves


def test_reshaped_rows_are_laid_out_once():
    e = estimate(lambda x: total(x.reshape(D, T)), array(T, D))
    assert e.moves == 1 and max(e.words.values()) == T * D / MIDDLE


def test_what_is_part_of_the_program_and_one_pe_move_nothing():
    counted = lambda c: lax.scan(lambda c, i: (c + i, None), c, jnp.arange(1000))[0]  # noqa: E731
    assert not estimate(counted, array(64, 64, dtype=jnp.int32)).moves
    for program, operand in ((total, array(T, D)), (running, array(D))):
        alone = wk.estimate(program, operand, wafer=wafer(1, 1))
        assert not alone.moves and not alone.assumed


def test_a_gradient_keeps_rows_where_they_are():
    """Forward the input and backward its cotangent are laid out; what is kept for it is not."""

    def loss(x):
        step = lambda c, row: (jnp.sin(c * row), None)  # noqa: E731
        return lax.scan(step, jnp.ones(D), x)[0].sum()

    e = estimate(jax.grad(loss), array(T, D))
    assert max(e.words.values()) == pytest.approx(2 * T * D / MIDDLE, rel=0.01)
