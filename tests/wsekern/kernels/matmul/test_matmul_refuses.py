"""What a product refuses, before anything is traced."""

import jax.numpy as jnp
import pytest

import wsekern as wk

pytestmark = pytest.mark.refuses


@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4, 3), (2, 4), r"a's columns \(3\) must equal b's rows \(2\)"),
        ((4, 3), ((3, 4), (2, 4)), r"a is \(4, 3\) and b is \(2, 4\)"),
        ((3,), (3, 4), "a is .* at least two dimensions"),
        ((4, 3), (3,), "b is .* at least two dimensions"),
        ((4, 3), (2, 3, 4), r"b must be a matrix, or have a's leading dimensions \(\)"),
        ((2, 4, 3), (3, 3, 4), r"b must be a matrix, or have a's leading dimensions \(2,\)"),
        ((4, 3), (), "b is an empty tuple"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wafer, a, b, message):
    of_many = not b or isinstance(b[0], tuple)
    right = tuple(jnp.ones(shape) for shape in b) if of_many else jnp.ones(b)
    with pytest.raises(ValueError, match=f"^matmul: .*{message}"):
        wk.matmul(jnp.ones(a), right, wafer=wafer)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("float32", "bfloat16"), "a is float32 and b is bfloat16: cast one of them first"),
        (("int32", "int32"), "a is int32; cast it to a floating dtype"),
        (("float32", "int8"), "b is int8 and scales is None; give the scale of each of its 4"),
    ],
)
def test_refuses_dtypes_that_do_not_fit(dtypes, message):
    a, b = (jnp.ones((4, 4), dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        wk.matmul(a, b, wafer=wk.Wafer.virtual(wk.WSE2, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transpose_a": True, "transpose_b": True}, "both True: a.* multiply b by a"),
        ({"activation": "swish"}, "activation='swish' is not one of 'relu', 'gelu'"),
        ({"bias": jnp.ones(3)}, r"bias is \(3,\), it must be \(4,\)"),
        ({"scales": jnp.ones(4)}, "scales are for int8 weights, b is float32"),
        (
            {"algorithm": "mesh_gemm"},
            r"least common multiple .* it is 3x5; use one of \('allgather'",
        ),
        ({"algorithm": "2.5d"}, "needs more than one wafer, there is one; use one of"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    wafer = wk.Wafer.virtual(wk.WSE2, 3, 5)
    with pytest.raises(ValueError, match=f"^matmul: .*{message}"):
        wk.matmul(jnp.ones((4, 4)), jnp.ones((4, 4)), wafer=wafer, **options)


def test_refuses_an_unknown_algorithm():
    with pytest.raises(ValueError, match="algorithm='strassen' is not one of 'auto', 'allgather'"):
        wk.matmul(jnp.ones((4, 4)), jnp.ones((4, 4)), algorithm="strassen")  # type: ignore
