"""Which kernels are one program, traced once; and what a program's specs must say."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.wafer import program
from wsekern.wafer.program import freeze, program_key

TILED = P("y", "x")
U = np.arange(32, dtype=np.float32).reshape(4, 8)
TRACES: list = []


def wafer_of(backend):
    return wk.Wafer.devices(2, 4) if backend == "devices" else wk.Wafer.virtual(wk.WSE2, 2, 4)


@pytest.fixture(params=["devices", "virtual"])
def wafer_24(request):
    return wafer_of(request.param)


@pytest.fixture(autouse=True)
def nothing_traced_yet():
    TRACES.clear()
    program._kept_program.cache_clear()


def plus(u, by, *, then=0):
    TRACES.append(by)
    return u + jnp.asarray(by)[None, None] + then


def map_tiles(wafer, kernel):
    return wafer.map(kernel, in_specs=TILED, out_specs=TILED)


def in_partial(by):
    return functools.partial(plus, by=by)


def in_lambda(by):
    return lambda u: plus(u, by)


def in_default(by):
    return lambda u, held=by: plus(u, held)


def in_keyword_default(by):
    def kernel(u, *, held=by):
        return plus(u, held)

    return kernel


def in_a_partial_in_a_lambda(by):
    held = functools.partial(plus, then=by)
    return lambda u: held(u, 0)


MAKERS = [in_partial, in_lambda, in_default, in_keyword_default, in_a_partial_in_a_lambda]


@pytest.mark.parametrize("make", MAKERS)
def test_a_kernel_made_afresh_at_each_call_is_traced_once(wafer_24, make):
    for by in (1, 2, 1, 2):
        np.testing.assert_array_equal(map_tiles(wafer_24, make(by))(U), U + by)
    assert len(TRACES) == 2


@pytest.mark.parametrize("make", MAKERS[:2])
def test_values_that_are_equal_but_of_another_type_are_other_programs(wafer_24, make):
    ints = U.astype(np.int32)
    got = [map_tiles(wafer_24, make(by))(ints).dtype for by in (1, 1.0, True, np.float16(1))]
    assert got == [jnp.int32, jnp.float32, jnp.int32, jnp.float16]
    assert len(TRACES) == 4


def test_other_code_is_another_program_even_on_one_line(wafer_24):
    kernels = [lambda u: plus(u, 1), lambda u: plus(u, 2), lambda u: plus(u, 1.0)]
    got = [map_tiles(wafer_24, kernel)(U)[0, 0] for kernel in kernels]
    assert got == [1, 2, 1] and TRACES == [1, 2, 1.0]


def test_equal_programs_are_one_and_unequal_ones_are_not():
    wafer = wafer_of("devices")
    program = map_tiles(wafer, in_lambda(1))
    assert map_tiles(wafer_of("devices"), in_lambda(1)) is program
    others = [
        map_tiles(wk.Wafer.devices(4, 2), in_lambda(1)),
        map_tiles(wafer_of("virtual"), in_lambda(1)),
        wafer.map(in_lambda(1), in_specs=(TILED,), out_specs=TILED),
        wafer.map(in_lambda(1), in_specs=TILED, out_specs=P("x", "y")),
        wafer.map(in_lambda(1), in_specs=TILED, out_specs=TILED, replicated_by_construction=True),
    ]
    assert program not in others and len(set(others)) == len(others)


def test_what_cannot_be_hashed_may_be_held_and_is_read_at_each_call(wafer_24):
    held = [1]

    def kernel(u):
        return plus(u, held[0])

    for held[0] in (1, 2):
        np.testing.assert_array_equal(map_tiles(wafer_24, kernel)(U), U + held[0])
        np.testing.assert_array_equal(
            map_tiles(wafer_24, in_lambda(np.float32(held[0])))(U), U + held[0]
        )


def test_a_kernel_may_hold_a_traced_value(wafer_24):
    @jax.jit
    def run(u, by):
        return map_tiles(wafer_24, in_lambda(by))(u)

    for by in (1.0, 2.0):
        np.testing.assert_array_equal(run(U, by), U + by)
    np.testing.assert_array_equal(run(U[:2], 3), U[:2] + 3)


@pytest.mark.parametrize("pair", [((1,), (1.0,)), (0.0, -0.0)], ids=["in a tuple", "signed zero"])
def test_equal_values_inside_others_are_other_programs_too(pair):
    wafer = wafer_of("virtual")

    def kernel(u, held):
        return jnp.full(u.shape, jnp.copysign(1, held) if held == 0 else held[0])

    first, second = (map_tiles(wafer, functools.partial(kernel, held=held))(U) for held in pair)
    assert (first.dtype, float(first[0, 0])) != (second.dtype, float(second[0, 0]))


def test_a_kernel_may_call_itself():
    def kernel(u, times=2):
        return kernel(u + 1, times - 1) if times else u

    np.testing.assert_array_equal(map_tiles(wafer_of("virtual"), kernel)(U), U + 2)


def test_what_a_kernel_holds_is_read_when_the_program_is_asked_for():
    def programs(*values):
        made = []
        for by in values:
            made.append(map_tiles(wafer_of("virtual"), lambda u: plus(u, by)))  # noqa: B023
        return made

    np.testing.assert_array_equal(programs(10, 20)[0](U), U + 10)
    np.testing.assert_array_equal(programs(20)[0](U), U + 20)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("in_specs", "out_specs", "message"),
    [
        ((TILED, P()), TILED, r"in_specs=\(P\('y', 'x'\), P\(\)\) does not match the structure"),
        ({"u": TILED}, TILED, "in_specs={'u': .*does not match the structure"),
        (TILED, (TILED, TILED), r"out_specs=\(.*does not match the structure"),
        ((TILED, None), TILED, "in_specs=.*does not match the structure"),
        (TILED, "yx", "'yx' stands where a jax.sharding.PartitionSpec belongs; P"),
    ],
)
def test_specs_that_do_not_fit_are_named(in_specs, out_specs, message):
    with pytest.raises(ValueError, match=f"Wafer.map: {message}"):
        wafer_of("virtual").map(in_lambda(0), in_specs=in_specs, out_specs=out_specs)(U)


def ring_sum(u):
    """The sum over x, in which JAX cannot see that all PEs end with the same."""
    total = moved = u
    for _ in range(fabric.axis_size("x") - 1):
        moved = fabric.shift(moved, "x")
        total += moved
    return total


def test_jax_refuses_what_it_cannot_see_to_be_replicated():
    with pytest.raises(ValueError, match="replication which can't be statically inferred"):
        wafer_of("devices").map(ring_sum, in_specs=TILED, out_specs=P("y"))(U)


def test_a_result_replicated_by_construction_is_the_same_on_every_pe(wafer_24):
    run = functools.partial(wafer_24.map, ring_sum, in_specs=TILED, replicated_by_construction=True)
    want = U.reshape(4, 4, 2).sum(1)
    every_copy = run(out_specs=TILED)(U)
    np.testing.assert_array_equal(every_copy, np.tile(want, (1, 4)))
    once = run(out_specs=P("y"))(U)
    for shard in once.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
    np.testing.assert_array_equal(once, want)


def test_the_gradient_of_such_a_result_counts_it_once(wafer_24):
    run = wafer_24.map(ring_sum, in_specs=TILED, out_specs=P("y"), replicated_by_construction=True)
    weights = np.arange(8, dtype=np.float32).reshape(4, 2)
    gradient = jax.jit(jax.grad(lambda u: (weights * run(u)).sum()))(U)
    np.testing.assert_array_equal(gradient, np.tile(weights, (1, 4)))


def test_no_operand_at_all_is_fine(wafer_24):
    where = wafer_24.map(
        lambda: fabric.axis_index(("y", "x"))[None], in_specs=(), out_specs=P(("y", "x"))
    )
    np.testing.assert_array_equal(where(), np.arange(8))


def add(u, by):
    return u + by


def kernel_holding(value):
    return lambda u: add(u, value)


@dataclasses.dataclass(frozen=True)
class Rule:
    scale: float
    parts: tuple


SAME = [
    (kernel_holding(1), kernel_holding(1)),
    (kernel_holding((1, "a")), kernel_holding((1, "a"))),
    (kernel_holding(Rule(1.0, (1, 2))), kernel_holding(Rule(1.0, (1, 2)))),
    (functools.partial(add, by=1), functools.partial(add, by=1)),
    (functools.partial(kernel_holding(1)), functools.partial(kernel_holding(1))),
    (kernel_holding(add), kernel_holding(add)),
]
OTHER = [
    (kernel_holding(1), kernel_holding(1.0)),
    (kernel_holding(1), kernel_holding(True)),
    (kernel_holding((1,)), kernel_holding((1.0,))),
    (kernel_holding(0.0), kernel_holding(-0.0)),
    (kernel_holding(np.float32(1)), kernel_holding(np.float64(1))),
    (kernel_holding(Rule(1.0, (1,))), kernel_holding(Rule(1.0, (1.0,)))),
    (kernel_holding(kernel_holding(1)), kernel_holding(kernel_holding(2))),
    (functools.partial(add, by=1), functools.partial(add, 1)),
    (lambda u: u, lambda u: u + 1),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_made_afresh_it_is_the_same_program(a, b):
    assert program_key(a) == program_key(b) and hash(program_key(a)) == hash(program_key(b))


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_what_differs_in_what_it_holds_is_another(a, b):
    assert program_key(a) != program_key(b)


def test_code_that_is_loaded_anew_is_another_program():
    source = "lambda u: helper(u)"
    assert program_key(eval(source)) != program_key(eval(source))


def calls_itself():
    def kernel(u, times=2):
        return kernel(u + 1, times - 1) if times else u

    return kernel


def key_before_a_helper_exists():
    def kernel(u):
        return later(u)

    key = program_key(kernel)

    def later(u):
        return u

    return key


def test_what_cannot_be_told_has_no_key():
    assert program_key(kernel_holding([1])) is None
    assert program_key(kernel_holding(np.zeros(2))) is None
    assert (
        program_key(kernel_holding(jnp.zeros(2))) is None
    )  # a program that is kept would keep it in memory
    assert program_key(calls_itself()) is None
    assert key_before_a_helper_exists() is None


def test_frozen_keeps_what_is_held_now():
    by = 1

    def inner(u):
        return u + by

    kernel = functools.partial(lambda u, times: inner(u) * times, times=10)
    kept = freeze(kernel)
    by = 2
    assert (kept(0), kernel(0)) == (10, 20)
    assert program_key(kept) != program_key(kernel)


def test_frozen_keeps_defaults_and_its_name():
    by = 1

    def kernel(u, a=3, *, b=4):
        return u + by + a + b

    kept = freeze(kernel)
    assert kept(0) == 8 and kept.__name__ == "kernel"


def test_in_a_script_a_helper_defined_anew_is_another_program():
    script = (
        "from wsekern.wafer.program import program_key\n"
        "def make(): return lambda u: helper(u)\n"
        "def helper(u): return u + 1\n"
        "first = program_key(make())\n"
        "assert first == program_key(make())\n"
        "def helper(u): return u + 2\n"
        "assert first != program_key(make())\n"
        "def helper(u): return helper(u - 1) if u else 0\n"
        "assert program_key(make()) == program_key(make()) is not None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
