"""The words and steps that `wk.traffic` counts, against counts by hand."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.estimator.traffic import traffic

WAFER = wk.Wafer.abstract(wk.WSE2, 4, 8)
TILED = P("y", "x")
TILE = 16 * 8  # words of a PE's tile
WHOLE = jax.ShapeDtypeStruct((4 * 16, 8 * 8), jnp.float32)


def traffic_of(kernel, whole: Any = WHOLE):
    return traffic(WAFER.map(kernel, in_specs=TILED, out_specs=TILED), whole, wafer=WAFER)


@pytest.mark.parametrize(
    ("move", "words"),
    [
        (lambda u: fabric.shift(u, "x", 3), TILE),
        (lambda u: fabric.route(u, "y", [(0, 2)]), TILE),
        (lambda u: fabric.all_gather(u, "x", 1), 7 * TILE),
        (lambda u: fabric.reduce_scatter(u, "x", 1), TILE * 7 / 8),
        (lambda u: fabric.all_to_all(u, "y", 0, 1), TILE * 3 / 4),
        (lambda u: fabric.all_reduce(u, ("y", "x"), "max", algorithm="xla"), TILE * 2 * 31 / 32),
    ],
    ids=["shift", "route", "all_gather", "reduce_scatter", "all_to_all", "all_reduce"],
)
def test_words_of_one_move(move, words):
    count = traffic_of(move)
    assert (count.words, count.steps, count.moves) == (words, 1, 1)


def test_sixteen_bits_are_half_a_word():
    count = traffic_of(
        lambda u: fabric.shift(u, "x"), jax.ShapeDtypeStruct(WHOLE.shape, jnp.bfloat16)
    )
    assert count.words == TILE / 2


def test_a_step_is_a_move_that_waits():
    side_by_side = traffic_of(lambda u: fabric.shift(u, "x") + fabric.shift(u, "y"))
    one_by_one = traffic_of(lambda u: fabric.shift(fabric.shift(u, "x"), "y"))
    assert (side_by_side.steps, side_by_side.moves) == (1, 2)
    assert (one_by_one.steps, one_by_one.moves) == (2, 2)
    assert side_by_side.words == one_by_one.words == 2 * TILE


def test_a_scan_counts_every_trip_and_the_chain_through_its_carry():
    def kernel(u):
        def step(carry, _):
            far, near, total = carry
            return (fabric.shift(far, "x"), near, total + fabric.shift(near, "y")), None

        start = (u, u, jnp.zeros_like(u))
        (far, _, total), _ = lax.scan(step, fabric.varying(start), length=5)
        return far + total

    count = traffic_of(kernel)
    assert (count.steps, count.moves, count.words) == (5, 10, 10 * TILE)


def test_a_shift_by_the_whole_axis_is_no_move():
    assert traffic_of(lambda u: fabric.shift(u, "x", 8)).moves == 0
    assert traffic_of(lambda u: u + 1).words == 0


def test_the_branch_that_receives_more_is_counted():
    def kernel(u):
        return lax.cond(
            fabric.all_reduce(u, ("y", "x"), "max", algorithm="xla").max() > 0,
            lambda u: fabric.shift(u, "x"),
            lambda u: fabric.shift(fabric.shift(u, "x"), "x"),
            u,
        )

    assert traffic_of(kernel).words_by_move["shift"] == 2 * TILE


def test_gradients_are_counted_too():
    run = WAFER.map(lambda u: fabric.shift(u, "x"), in_specs=TILED, out_specs=TILED)
    count = traffic(jax.grad(lambda u: run(u * u).sum()), WHOLE, wafer=WAFER)
    assert count.words == 2 * TILE


@pytest.mark.parametrize(
    "wafer", [wk.Wafer.devices(2, 4), wk.Wafer.virtual(wk.WSE2, 2, 4)], ids=["devices", "virtual"]
)
def test_every_backend_has_the_same_moves(wafer):
    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    run = functools.partial(wk.matmul, algorithm="allgather")
    with wafer:
        count = traffic(run, a, a)
    assert count.words == 3 * 32 * 16 + 1 * 32 * 16


def test_it_prints_words_steps_and_moves():
    count = traffic_of(lambda u: fabric.shift(u, "x"))
    assert str(count) == "128 words a PE in 1 steps, 1 moves (shift 128)"


def test_a_notebook_shows_it_as_a_table():
    count = traffic_of(lambda u: fabric.shift(u, "x"))
    assert isinstance(count, wk.Traffic)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", count._repr_html_())
    assert cells == ["words a PE", "128", "steps", "1", "moves", "1", "shift, words", "128"]


def test_a_linear_solve_counts_as_its_solution():
    """Only the solution runs. It waits for its own operands, not for those of the product."""

    def kernel(u):
        near = fabric.shift(u, "y")
        return lax.custom_linear_solve(lambda x: near * x, u, lambda _, b: fabric.shift(b, "x"))

    count = traffic_of(kernel)
    assert (count.steps, count.words) == (1, 2 * TILE)


def test_refuses_a_move_in_a_loop_of_unknown_length():
    def kernel(u):
        return lax.while_loop(lambda u: jnp.all(u < 0), lambda u: fabric.shift(u, "x"), u)

    with pytest.raises(ValueError, match="a move stands in a while loop"):
        traffic_of(kernel)


def test_refuses_without_a_wafer():
    with pytest.raises(ValueError, match="there is no wafer"):
        traffic(lambda u: u, WHOLE)
