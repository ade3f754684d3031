"""What compilers of TPUs make of products: `auto` waits for less than jit alone; needs libtpu."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.compiler import hlo

pytestmark = pytest.mark.tpu
SIDE = 2048
MATRIX = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16)


@pytest.fixture(scope="module", params=["v5e:4x4", "v6e:4x4"])
def chips(request):
    return wk.Wafer.topology(request.param)


def compiled(function, chips, count=2):
    return wk.compile(function, *[MATRIX] * count, wafer=chips, roofline=False)


@pytest.fixture(scope="module")
def by_jit(chips):
    return compiled(plain(chips), chips)


@pytest.fixture(scope="module")
def by_auto(chips):
    return compiled(lambda a, b: wk.matmul(a, b, wafer=chips), chips)


def plain(chips):
    """A product as jit alone splits it."""
    tiled = chips.sharding(P("y", "x"))
    return lambda a, b: jax.lax.with_sharding_constraint(a @ b, tiled)


def gradients(product, chips):
    tiled = chips.sharding(P("y", "x"))

    def run(a, b, dc):
        both = jax.vjp(product, a, b)[1](dc)
        return tuple(jax.lax.with_sharding_constraint(d, tiled) for d in both)

    return run


def test_auto_is_faster_than_jit_alone_and_keeps_no_more(by_auto, by_jit):
    assert by_auto.seconds < 0.8 * by_jit.seconds
    assert by_auto.waited_bytes < 0.8 * by_jit.waited_bytes
    assert by_auto.memory.temporaries <= by_jit.memory.temporaries


def test_its_gradients_take_no_longer(chips):
    """Nor do they wait for more, though jit sends sums here and they send operands."""
    ours, jits = (
        compiled(gradients(product, chips), chips, 3)
        for product in (lambda a, b: wk.matmul(a, b, wafer=chips), plain(chips))
    )
    assert ours.seconds < jits.seconds
    assert ours.waited_bytes <= jits.waited_bytes
    assert ours.memory.temporaries <= jits.memory.temporaries
    assert "reduce-scatter" not in {key.kind for key in ours.cost.sent}  # no sums travel


def test_gathers_are_as_cheap_as_those_of_jit_alone(chips, by_jit):
    gathers = compiled(lambda a, b: wk.matmul(a, b, algorithm="allgather", wafer=chips), chips)
    assert gathers.seconds <= 1.001 * by_jit.seconds


def test_bias_activation_and_scales_are_a_part_of_the_last_product(chips, by_auto):
    """No pass over the result is added to the products."""
    vector = jax.ShapeDtypeStruct((SIDE,), jnp.bfloat16, sharding=chips.sharding(P("x")))
    weights = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.int8)

    def run(a, b, scales, bias):
        return wk.matmul(a, b, scales=scales, bias=bias, activation="relu", wafer=chips)

    full = wk.compile(run, MATRIX, weights, vector, vector, wafer=chips, roofline=False)
    assert full.memory.temporaries <= by_auto.memory.temporaries + 2**16
    assert full.cost is not None
    assert full.cost.fusion_seconds < 1.5 * by_auto.cost.fusion_seconds


@pytest.mark.parametrize(
    ("algorithm", "beside"),
    # Of 6 shifts, 24 pieces of panels and 6 halves of tiles; at this size some arrive before.
    [("cannon", 4), ("mesh_gemm", 4), ("summa", 20), ("collective", 2)],
)
def test_the_transfer_of_the_next_tile_stands_beside_the_product(chips, algorithm, beside):
    run = compiled(lambda a, b: wk.matmul(a, b, algorithm=algorithm, wafer=chips), chips)
    program = hlo.parse(run.executable.as_text())
    hidden, on_their_way = set(), set()
    for one in program.main.instructions:
        inside = [each.opcode for _, called in program.called(one) for each in called.instructions]
        if one.opcode == "collective-permute-start":
            on_their_way.add(one.name)
        elif one.opcode == "collective-permute-done":
            on_their_way -= set(one.operands)
        elif "convolution" in inside:  # a TPU's word for a product
            hidden |= on_their_way
    assert len(hidden) >= beside


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_rows_that_the_chips_do_not_divide_are_as_fast_as_by_jit_alone(chips, rows):
    """They are not split; each chip along y has them all, as a caller's array has."""
    features = 2048
    a = jax.ShapeDtypeStruct((rows, features), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((features, 4 * features), jnp.bfloat16)
    whole = chips.sharding(P(None, "x"))
    alone, ours = (
        wk.compile(run, a, b, wafer=chips, roofline=False, out_shardings=whole)
        for run in (jnp.matmul, lambda a, b: wk.matmul(a, b, wafer=chips))
    )
    assert ours.seconds and alone.seconds and ours.seconds <= 1.001 * alone.seconds
    assert ours.waited_bytes <= alone.waited_bytes


def test_few_rows_meet_several_weights_where_these_lie(chips):
    """No copy puts the weights side by side."""
    a = jax.ShapeDtypeStruct((16, 2048), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((2048, 8192), jnp.bfloat16)
    both = wk.compile(
        lambda a, b, c: wk.matmul(a, (b, c), wafer=chips), a, b, b, wafer=chips, roofline=False
    )
    one = wk.compile(lambda a, b: wk.matmul(a, b, wafer=chips), a, b, wafer=chips, roofline=False)
    assert both.seconds and one.seconds and both.seconds < 2.2 * one.seconds


def test_explain_says_why_in_microseconds(chips):
    explained = wk.matmul.explain(MATRIX, MATRIX, wafer=chips)
    assert explained.algorithm == "cannon" and "held KiB  us" in str(explained)
    few = wk.matmul.explain((16, 8192), (8192, 8192), dtype=jnp.bfloat16, wafer=chips)
    assert few.algorithm == "stationary"
    wide = wk.Wafer.topology("v5e:2x8")  # not square
    assert wk.matmul.explain(MATRIX, MATRIX, wafer=wide).algorithm == "xla"
