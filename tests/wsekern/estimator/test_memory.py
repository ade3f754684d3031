"""The arrays that live where memory is fullest; how many bytes they are: `test_estimate`."""

import jax
import jax.numpy as jnp

import wsekern as wk
from wsekern.estimator.memory import live_at_peak
from wsekern.estimator.trace import trace_program

WAFER = wk.Wafer.abstract(wk.WSE3, 2, 2)


def live(function, *shapes):
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    jaxpr, _ = trace_program("test", function, shapes, WAFER)
    return live_at_peak(jaxpr, WAFER, [leaf.size * 4 // WAFER.size for leaf in shapes])


def test_the_largest_array_stands_first_with_its_line():
    def program(a):
        wide = jnp.concatenate([a] * 8)
        return jnp.sin(wide).sum(), a

    first = live(program, (64, 64))[0]
    assert first.shape == (512, 64) and first.bytes == 512 * 64 * 4 / WAFER.size
    assert first.made_by == "concatenate" and first.line.startswith("test_memory.py:")


def test_what_a_loop_holds_inside_is_named_too():
    def program(a):
        def body(carry, _):
            wide = jnp.concatenate([carry] * 16)
            return jnp.cos(wide)[:64], None

        return jax.lax.scan(body, a, None, length=3)[0]

    assert live(program, (64, 64))[0].shape == (1024, 64)


def test_arguments_have_the_bytes_of_their_own_layout():
    arrays = live(lambda a, b: a + b, (64, 64), (64, 64))
    assert [array.made_by for array in arrays] == ["argument"] * 2 + ["add"]
    assert {array.bytes for array in arrays} == {64 * 64 * 4 / WAFER.size}
    whole = live_at_peak(
        jax.make_jaxpr(lambda a: a + 1)(jnp.zeros((8, 8))).jaxpr, WAFER, [8 * 8 * 4.0]
    )
    assert whole[0].bytes == 256
