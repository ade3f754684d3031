"""Every algorithm of `matmul` equals the plain product, in all forms and on every kind of wafer."""

import functools
import inspect
import pathlib
import re
import sys
import traceback
from typing import Any, assert_type, get_args

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from wsekern.kernels.matmul.choice import PRICES
from wsekern.kernels.matmul.choice import serving as algorithms
from wsekern.kernels.matmul.signature import Algorithm
from wsekern.wafer.explanation import Explanation

DIVIDES, PADDED = (8, 16, 8), (5, 39, 7)  # M, K, N
OPERANDS = {
    "a row": ((1, 9), (9, 5)),
    "a column": ((6, 9), (9, 1)),
    "an outer product": ((5, 1), (1, 6)),
    "smaller than the grid": ((1, 1), (1, 1)),
    "batched rows, one matrix": ((3, 5, 7), (7, 3)),
    "a matrix each": ((3, 5, 7), (3, 7, 3)),
    "two leading dimensions": ((3, 2, 5, 7), (3, 2, 7, 3)),
    "two leading dimensions, one matrix": ((2, 3, 5, 7), (7, 3)),
}


def whole_numbers(*shape):
    """Products and sums of these are exact in float32, in any order, but not in bfloat16."""
    return np.random.default_rng(shape).integers(-15, 16, shape).astype(np.float32)


def plain(a, b):
    return np.einsum("...mk,...kn->...mn", np.int64(a), np.int64(b))


def plain_gradients(a, b, dc):
    a, b, dc = np.int64(a), np.int64(b), np.int64(dc)
    db = np.einsum("...mk,...mn->...kn", a, dc)
    return np.einsum("...mn,...kn->...mk", dc, b), db.sum(tuple(range(db.ndim - b.ndim)))


def product(wafer, algorithm="auto"):
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)


def with_gradients(run):
    """A jitted function that returns `run(a, b)` and the gradients of `a` and `b`."""

    @jax.jit
    def call(a, b, dc):
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    return call


FORMS: dict[str, dict[str, Any]] = {
    "nn": {},
    "nt": {"transpose_b": True},
    "tn": {"transpose_a": True},
}


def as_form(form, a, b):
    """`a` and `b` as `form` takes them."""
    return (a.swapaxes(-1, -2) if form == "tn" else a), (b.swapaxes(-1, -2) if form == "nt" else b)


def assert_right(run, a, b, dc, dtype=jnp.float32):
    """The product and both gradients equal the plain ones, rounded once, bit for bit."""
    got = with_gradients(run)(*(x.astype(dtype) for x in (a, b, dc)))
    for x, want in zip(got, (plain(a, b), *plain_gradients(a, b, dc)), strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, want.astype(np.float32).astype(dtype))


def assert_highest(program, products):
    """A StableHLO program has so many products, or more, and each in the highest precision."""
    precisions = re.findall(r"stablehlo.dot_general.* precision = (\[\w+, \w+\])", program)
    assert len(precisions) >= products and set(precisions) == {"[HIGHEST, HIGHEST]"}


# Every algorithm where no axis has one PE only, devices and virtual; on rectangles where it can.
EVERYWHERE = [
    ("allgather", "2x4"),
    ("summa", "virtual-2x4"),
    ("cannon", "2of2x2"),
    ("mesh_gemm", "3x3"),
    ("mesh_gemm", "virtual-2x4"),
    ("collective", "2x4"),
    ("stationary", "2of2x2"),
    ("xla", "2x4"),
]
MORE = [
    ("allgather", "2of2x2"),
    ("summa", "2of2x2"),
    ("mesh_gemm", "virtual-4x4"),
    ("collective", "virtual-4x4"),
    ("stationary", "2x4"),
    ("stationary", "virtual-4x4"),
    ("2.5d", "2of2x2"),
    ("2.5d", "virtual-2of2x2"),
    ("xla", "2of2x2"),
]


@pytest.fixture(params=EVERYWHERE, ids=" on ".join)
def everywhere(request, wafer_called):
    algorithm, grid = request.param
    return product(wafer_called(grid), algorithm)


@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_product(wafer, shape):
    M, K, N = shape
    a, b = whole_numbers(M, K), whole_numbers(K, N)
    c = jax.jit(product(wafer))(a, b)
    assert c.dtype == jnp.float32
    np.testing.assert_array_equal(c, plain(a, b))


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_results_and_gradients_of_any_shape(everywhere, operands):
    a, b = (whole_numbers(*shape) for shape in operands)
    assert_right(everywhere, a, b, whole_numbers(*a.shape[:-1], b.shape[-1]))


@pytest.mark.parametrize("leading", [(), (3,)], ids=["matrix", "batch"])
def test_bfloat16_is_summed_in_float32(everywhere, leading):
    a, b, dc = (
        whole_numbers(*leading, 23, 15),
        whole_numbers(15, 39),
        whole_numbers(*leading, 23, 39),
    )
    assert_right(everywhere, a, b, dc, dtype=jnp.bfloat16)


@pytest.mark.parametrize("leading", [(), (3,)], ids=["matrix", "batch"])
def test_a_tuple_of_right_factors_gives_a_tuple_of_products(everywhere, leading):
    a = whole_numbers(*leading, 5, 7)
    bs = tuple(whole_numbers(7, N) for N in (3, 8, 1))
    dcs = tuple(whole_numbers(*leading, 5, b.shape[-1]) for b in bs)
    cs, da, dbs = with_gradients(everywhere)(a, bs, dcs)
    assert isinstance(cs, tuple)
    of_each = [plain_gradients(a, b, dc) for b, dc in zip(bs, dcs, strict=True)]
    np.testing.assert_array_equal(da, sum(da for da, _ in of_each))
    for b, c, db, (_, want) in zip(bs, cs, dbs, of_each, strict=True):
        np.testing.assert_array_equal(c, plain(a, b))
        np.testing.assert_array_equal(db, want)


def test_a_tuple_gathers_its_left_factor_once():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 4))
    run = jax.jit(product(wk.Wafer.devices(2, 4), "allgather"))
    one, three = (run.lower(a, bs).as_text() for bs in (b, (b, b, b)))
    assert one.count("stablehlo.all_gather") == three.count("stablehlo.all_gather") == 2


@pytest.mark.parametrize("algorithm", algorithms(wk.Wafer.virtual(wk.WSE2, 2, 2)))
def test_the_gradient_keeps_only_the_operands(algorithm):
    a, b = jnp.ones((4, 8)), jnp.ones((8, 12))
    run = product(wk.Wafer.virtual(wk.WSE2, 2, 2), algorithm)
    kept = jax.eval_shape(lambda a, b: jax.vjp(run, a, b)[1], a, b)
    assert sorted(x.shape for x in jax.tree.leaves(kept)) == [(4, 8), (8, 12)]


@pytest.mark.parametrize("algorithm", ["summa", "cannon", "mesh_gemm"])
def test_temporaries_are_smaller_than_when_gathering(algorithm, as_shipped):
    a = b = jax.ShapeDtypeStruct((512, 512), jnp.float32)

    def temporary_bytes(algorithm):
        run = jax.jit(product(wk.Wafer.devices(4, 4), algorithm))
        memory = run.lower(a, b).compile(compiler_options=as_shipped).memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(algorithm) < temporary_bytes("allgather")


def test_auto_on_emulated_devices_gathers_if_little_and_else_takes_rounds():
    def program(M, K):
        a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, K), (K, K)))
        return jax.jit(product(wk.Wafer.devices(4, 4))).lower(a, b).as_text()

    assert program(1024, 1024).count("stablehlo.all_gather") == 2
    in_rounds = program(2048, 2048)
    assert "stablehlo.while" in in_rounds and "stablehlo.reduce_scatter" in in_rounds
    few_rows = program(8, 2048)
    assert "stablehlo.while" not in few_rows and "stablehlo.reduce_scatter" in few_rows
    assert "stablehlo.while" in program(2052, 2048)  # rows that do not divide: summa


def optimized_program(function, *operands):
    """The program that XLA compiles, without the parts that only say where it comes from."""
    text = jax.jit(function).lower(*operands).compile().as_text() or ""
    return re.sub(
        r", metadata=\{[^}]*\}|HloModule [^,]*|FileNames[\s\S]*?(?=\n%|\nENTRY)", "", text
    )


@pytest.mark.parametrize("wafer", [None, wk.Wafer.devices(1, 1)], ids=["no wafer", "one PE"])
@pytest.mark.parametrize(
    ("options", "plainly"),
    [
        ({}, lambda a, b, bias: jnp.matmul(a, b)),
        ({"transpose_a": True}, lambda a, b, bias: jnp.matmul(a.T, b)),
        ({"transpose_b": True}, lambda a, b, bias: jnp.matmul(a, b.T)),
        (
            {"activation": "silu"},
            lambda a, b, bias: jax.nn.silu(jnp.matmul(a, b) + bias[None]),
        ),
    ],
    ids=["nn", "nt", "tn", "epilogue"],
)
def test_one_pe_runs_the_plain_program(wafer, options, plainly):
    def call(a, b, bias):
        bias = bias if "activation" in options else None
        return wk.matmul(a, b, bias=bias, wafer=wafer, **options)

    operands = jnp.ones((8, 8)), jnp.ones((8, 8)), jnp.ones(8)
    assert optimized_program(call, *operands) == optimized_program(plainly, *operands)


def test_runs_on_the_wafer_in_force():
    a, b = whole_numbers(5, 7), whole_numbers(7, 3)
    run = jax.jit(lambda a, b: wk.matmul(a, b))
    plainly = run(a, b)
    with wk.Wafer.devices(2, 4):
        program = run.lower(a, b).as_text()
        np.testing.assert_array_equal(run(a, b), plainly)
    assert "stablehlo.all_gather" in program


def test_algorithms_that_serve_a_grid():
    anywhere = {"allgather", "summa", "collective", "stationary"}
    assert set(algorithms(wk.Wafer.virtual(wk.WSE2, 2, 3))) == anywhere | {"cannon", "mesh_gemm"}
    assert set(algorithms(wk.Wafer.virtual(wk.WSE2, 3, 5))) == anywhere
    assert "2.5d" in algorithms(wk.Wafer.virtual(wk.WSE2, 2, 2, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", EVERYWHERE + MORE, ids=" on ".join)
def test_forms_and_their_gradients(form, where, wafer_called):
    """`a @ b^T` and `a^T @ b` take operands as they lie, and so do their gradients."""
    algorithm, grid = where
    run = functools.partial(product(wafer_called(grid), algorithm), **FORMS[form])
    M, K, N = PADDED
    a, b, dc = whole_numbers(M, K), whole_numbers(K, N), whole_numbers(M, N)
    c, da, db = with_gradients(run)(*as_form(form, a, b), dc)
    np.testing.assert_array_equal(c, plain(a, b))
    for got, want in zip(as_form(form, da, db), plain_gradients(a, b, dc), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", ["nt", "tn"])
@pytest.mark.parametrize("where", EVERYWHERE, ids=" on ".join)
def test_forms_of_a_batch_with_one_matrix(form, where, wafer_called):
    algorithm, grid = where
    run = functools.partial(product(wafer_called(grid), algorithm), **FORMS[form])
    a, b, dc = whole_numbers(3, 5, 7), whole_numbers(7, 6), whole_numbers(3, 5, 6)
    c, da, db = with_gradients(run)(*as_form(form, a, b), dc)
    np.testing.assert_array_equal(c, plain(a, b))
    for got, want in zip(as_form(form, da, db), plain_gradients(a, b, dc), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows_in_rounds(form):
    """As `auto` takes them on emulated devices beyond 4 MiB, forward and backward."""
    wafer = wk.Wafer.devices(2, 4)
    run = functools.partial(product(wafer), **FORMS[form])
    a, b, dc = whole_numbers(1024, 1536), whole_numbers(1536, 1500), whole_numbers(1024, 1500)
    left, right = operands = as_form(form, a, b)
    explained = str(wk.explain_matmul(left, right, wafer=wafer, **FORMS[form]))
    assert ("summa, " if form == "tn" else "in 2 rounds") in explained
    c, da, db = with_gradients(run)(*operands, dc)
    np.testing.assert_array_equal(c, a @ b)
    for got, want in zip(as_form(form, da, db), (dc @ b.T, a.T @ dc), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_tuple(form, full_wafer):
    a, bs = whole_numbers(5, 7), tuple(whole_numbers(7, N) for N in (3, 8))
    dcs = tuple(whole_numbers(5, N) for N in (3, 8))
    run = functools.partial(product(full_wafer), **FORMS[form])
    left, right = as_form(form, a, a)[0], tuple(as_form(form, a, b)[1] for b in bs)
    cs, da, dbs = with_gradients(run)(left, right, dcs)
    of_each = [plain_gradients(a, b, dc) for b, dc in zip(bs, dcs, strict=True)]
    np.testing.assert_array_equal(as_form(form, da, a)[0], sum(da for da, _ in of_each))
    for b, c, db, (_, want) in zip(bs, cs, dbs, of_each, strict=True):
        np.testing.assert_array_equal(c, plain(a, b))
        np.testing.assert_array_equal(as_form(form, a, db)[1], want)


@pytest.mark.parametrize("activation", [jnp.sqrt, jnp.log])
def test_an_activation_that_is_steep_at_0_has_its_gradient(full_wafer, activation):
    """The padding is zeros: what is made of them must not reach any row or column."""
    a, b = jnp.linspace(1, 2, 5 * 7).reshape(5, 7), jnp.linspace(1, 2, 7 * 6).reshape(7, 6)

    def total(a, b, wafer=None):
        return jnp.cos(wk.matmul(a, b, activation=activation, wafer=wafer)).sum()

    got, want = (
        jax.jit(jax.grad(functools.partial(total, wafer=w), (0, 1))) for w in (full_wafer, None)
    )
    for x, y in zip(got(a, b), want(a, b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "leading"), [("gelu_tanh", (3,)), (jnp.sin, ())], ids=["named", "a function"]
)
def test_bias_and_activation_equal_the_plain_expression(full_wafer, activation, leading):
    rng = np.random.default_rng(0)
    a, b, bias, dc = (
        np.float32(rng.normal(size=size))
        for size in ((*leading, 5, 7), (7, 6), 6, (*leading, 5, 6))
    )

    def results(run):
        def call(a, b, bias, dc):
            c, pullback = jax.vjp(run, a, b, bias)
            return c, *pullback(dc)

        return jax.jit(call)(a, b, bias, dc)

    def ours(wafer):
        return lambda a, b, bias: wk.matmul(a, b, bias=bias, activation=activation, wafer=wafer)

    for got, want in zip(results(ours(full_wafer)), results(ours(None)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("nn", jnp.float32), ("nt", jnp.float32), ("tn", jnp.float32), ("nn", jnp.bfloat16)],
)
def test_int8_weights_have_a_scale_for_each_column(full_wafer, form, dtype):
    a, b, dc = (whole_numbers(*s) for s in ((5, 7), (7, 6), (5, 6)))
    scales = np.float32(2.0 ** np.arange(6))
    left, right = as_form(form, a.astype(dtype), b.astype(np.int8))

    @jax.jit
    def call(left, right, scales, dc):
        run = functools.partial(product(full_wafer), **FORMS[form])
        c, pullback = jax.vjp(lambda a, b, s: run(a, b, scales=s), left, right, scales)
        da, db, dscales = pullback(dc)
        assert db.dtype == jax.dtypes.float0
        return c, da, dscales

    c, da, dscales = call(left, right, scales, dc.astype(dtype))
    assert c.dtype == da.dtype == dtype
    exact = np.float32(plain(a, b))
    np.testing.assert_array_equal(c, (exact * scales).astype(dtype))
    np.testing.assert_array_equal(as_form(form, da, a)[0], ((dc * scales) @ b.T).astype(dtype))
    np.testing.assert_array_equal(dscales, (exact * dc).sum(0))


def test_empty_matrices_give_the_plain_product(full_wafer):
    run = jax.jit(product(full_wafer))
    np.testing.assert_array_equal(run(jnp.ones((3, 0)), jnp.ones((0, 4))), jnp.zeros((3, 4)))
    assert run(jnp.ones((0, 3)), jnp.ones((3, 4))).shape == (0, 4)


@pytest.mark.parametrize("rows", [8, 720])
def test_the_explanation_of_auto_is_what_runs(rows):
    a, b = (rows, 512), (512, 512)
    wafer = wk.Wafer.abstract(wk.WSE2, 8, 8)
    explained = wk.explain_matmul(a, b, wafer=wafer)
    (marked,) = [line for line in str(explained).splitlines() if "<-" in line]
    assert marked.split()[0] == explained.algorithm and "<- auto" in marked
    assert "least common multiple" in str(wk.explain_matmul(a, b, wafer=wk.Wafer.abstract(wk.WSE2)))
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (a, b)]
    auto, named = (
        str(jax.make_jaxpr(product(wafer, algorithm))(*operands))
        for algorithm in ("auto", explained.algorithm)
    )
    assert auto == named
    assert wk.explain_matmul(a, b).algorithm == "plain"


@pytest.mark.parametrize(("algorithm", "mark"), [("auto", "<- auto"), ("mesh", "<- asked for")])
def test_explain_takes_the_keywords_of_the_call(algorithm, mark):
    wafer = wk.Wafer.abstract(wk.WSE2, 4, 4)
    a, b = jnp.ones((8, 16)), jnp.ones((16, 4))
    options: dict[str, Any] = dict(bias=jnp.ones(4), activation="relu", precision="highest")
    c = wk.matmul(a, b, algorithm="auto", **options)
    explained = wk.matmul.explain(a, b, algorithm=algorithm, wafer=wafer, **options)
    (marked,) = [line for line in str(explained).splitlines() if "<-" in line]
    assert marked.split()[0] == explained.algorithm and marked.endswith(mark)
    assert c.shape == (8, 4) and (algorithm == "auto" or explained.algorithm == "mesh_gemm")
    assert set(inspect.signature(wk.matmul).parameters) < set(
        inspect.signature(wk.matmul.explain).parameters
    )


@pytest.mark.refuses
def test_explain_refuses_what_the_call_refuses():
    a, wafer = jnp.ones((8, 8)), wk.Wafer.abstract(wk.WSE2, 4, 4)
    unknown: Any = "strassen"
    with pytest.raises(ValueError, match="explain_matmul: algorithm='strassen' is not one of"):
        wk.matmul.explain(a, a, algorithm=unknown)
    with pytest.raises(ValueError, match=r"explain_matmul: algorithm='2.5d' .*; use one of"):
        wk.matmul.explain(a, a, algorithm="2.5d", wafer=wafer)
    with pytest.raises(ValueError, match="explain_matmul: activation='swish' is not one of"):
        wk.matmul.explain(a, a, activation="swish")


def test_explain_is_known_to_type_checkers():
    """Mypy checks this file: it knows `matmul.explain`, and the result of either kind of `b`."""
    a = jnp.ones((4, 4))
    assert_type(wk.matmul.explain(a, a), Explanation)
    assert_type(wk.matmul(a, a), jax.Array)
    assert_type(wk.matmul(a, (a, a)), tuple[jax.Array, ...])
    assert wk.matmul.explain is wk.explain_matmul
    assert inspect.isfunction(wk.matmul)


def test_every_algorithm_is_in_the_docstring_and_the_type():
    named = {"auto", *PRICES}
    assert set(re.findall(r"^ *- `(.*)`: ", wk.matmul.__doc__ or "", re.M)) == named
    assert set(get_args(Algorithm)) == named | {"mesh"}


def test_the_former_name_of_mesh_gemm_is_accepted():
    wafer, operands = wk.Wafer.abstract(wk.WSE2, 4, 4), [jnp.ones((8, 8))] * 2
    former, new = (
        str(jax.make_jaxpr(product(wafer, name))(*operands)) for name in ("mesh", "mesh_gemm")
    )
    assert former == new


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", ["1x1", "2x4", "virtual-4x4"])
def test_precision_is_that_of_every_product(form, grid, wafer_called):
    run = functools.partial(wk.matmul, wafer=wafer_called(grid), precision="highest", **FORMS[form])
    operands = as_form(form, jnp.ones((8, 8)), jnp.ones((8, 8)))
    assert_highest(with_gradients(run).lower(*operands, jnp.ones((8, 8))).as_text(), products=3)


OURS = pathlib.Path(wk.__file__).parent
ON_WAFERS = [(name, grid) for grid in ("2x4", "virtual-2x4") for name in ("auto", *PRICES)]
ON_WAFERS = [pair for pair in ON_WAFERS if pair[0] not in ("2.5d", "xla")]
ON_WAFERS += [("auto", "1x1"), ("2.5d", "2of2x2"), ("2.5d", "virtual-2of2x2")]
ON_WAFERS += [("xla", "2x4")]


@pytest.mark.parametrize("where", ON_WAFERS, ids=" on ".join)
def test_a_product_is_few_calls_away(where, wafer_called, monkeypatch):
    """At most 14 functions of ours, in 7 files, from `wk.matmul` to the product of its tiles."""
    algorithm, grid = where
    stacks = []

    def recording(multiply):
        def call(*args, **kwargs):
            stacks.append([frame.filename for frame in traceback.extract_stack()])
            return multiply(*args, **kwargs)

        return call

    monkeypatch.setattr(jax.lax, "dot_general", recording(jax.lax.dot_general))
    monkeypatch.setattr(jnp, "matmul", recording(jnp.matmul))  # on one PE
    # Sizes of no other call: a program that is there already is not traced.
    K = 400 + ON_WAFERS.index(where)
    product(wafer_called(grid), algorithm)(jnp.ones((40, K)), jnp.ones((K, 24)))
    assert stacks
    for stack in stacks:
        files = [file for file in stack if OURS in pathlib.Path(file).parents]
        assert len(files) <= 14 and len(set(files)) <= 7, files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["devices-2x4", "virtual-3x2"])
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(sizes=st.tuples(*[st.integers(1, 9)] * 3), data=st.data())
def test_random_sizes(kind, sizes, data):
    M, K, N = sizes
    wafer = wk.Wafer.devices(2, 4) if kind == "devices-2x4" else wk.Wafer.virtual(wk.WSE2, 3, 2)
    algorithm = data.draw(st.sampled_from(algorithms(wafer)))
    a, b, dc = whole_numbers(M, K), whole_numbers(K, N), whole_numbers(M, N)
    assert_right(product(wafer, algorithm), a, b, dc)


@pytest.mark.parametrize("algorithm", ["allgather", "xla"])
@pytest.mark.parametrize("form", ["nn", "nt"])
def test_wafers_that_share_the_rows_of_a_gradient_give_the_same(form, algorithm, monkeypatch):
    """As on TPUs and GPUs, where each keeps its share of the sum over the wafers."""
    wafer, name = wk.Wafer.devices(2, 2, 2), "wsekern.kernels.matmul.matmul"
    a = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (4, 8, 16)), jnp.float32)
    b = jnp.asarray(np.random.default_rng(1).integers(-9, 9, (16, 8)), jnp.float32)
    b = b.T if form == "nt" else b

    def loss(a, b, wafer, algorithm):
        transposed = form == "nt"
        c = wk.matmul(a, b, transpose_b=transposed, algorithm=algorithm, wafer=wafer)
        return jnp.square(c).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=(2, 3))
    want = gradient(a, b, None, "auto")
    monkeypatch.setattr(sys.modules[name], "keeps_shares", lambda wafer: True)
    got = gradient(a, b, wafer, algorithm)
    text = gradient.lower(a, b, wafer, algorithm).as_text()
    assert algorithm == "xla" or "reduce_scatter" in text
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)
