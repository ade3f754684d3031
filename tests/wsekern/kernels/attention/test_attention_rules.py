"""Which keys a query sees and how scores are changed: every rule under every algorithm."""

import functools
import inspect
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsekern as wk
from wsekern.kernels.attention import plan

every = pytest.mark.parametrize("algorithm", ["ring", "allgather", "ulysses"])
NAMES = ("q", "k", "v", "bias", "sinks")


def operands(B, T, S, N, K, H, bias=None, sinks=False):
    rng = np.random.default_rng((B, T, S, N, K, H))
    shapes: dict[str, tuple] = {
        "q": (B, T, N, H),
        "k": (B, S, K, H),
        "v": (B, S, K, H),
        "dout": (B, T, N, H),
    }
    shapes |= {"bias": bias} if bias else {}
    shapes |= {"sinks": (N,)} if sinks else {}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def segment_ids_of(B, length, parts=3):
    """Segments of unequal lengths, different in each sequence."""
    return jnp.asarray(
        np.sort(np.random.default_rng(length).integers(0, parts, (B, length))).astype(np.int32)
    )


def plain(
    q, k, v, bias=None, sinks=None, *, causal=False, window=None, soft_cap=None, segment_ids=None
):
    """Attention with all scores at once; what is not seen has weight 0, not score -inf."""
    (B, T, N, H), S = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, N // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    t, s = np.arange(T)[:, None], np.arange(S)[None]
    seen = np.ones((B, 1, T, S), bool)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        seen, scores = seen & (bias > -1e30), scores + jnp.where(bias > -1e30, bias, 0)
    if causal:
        seen = seen & (s <= t)
    if window:
        seen = seen & (t - s < window)
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        seen = seen & (pair[0][:, :, None] == pair[1][:, None])[:, None]
    top = jax.lax.stop_gradient(jnp.abs(scores).max())
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.reshape(1, N, 1, 1) - top)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total > 0, total, 1.0), v)


def results(run, arrays):
    """The result, and the gradients of all operands."""
    floats = {name: arrays[name] for name in NAMES if name in arrays}

    @jax.jit
    def call(floats, dout):
        out, pull = jax.vjp(lambda floats: run(**floats), floats)
        return out, *pull(dout)[0].values()

    with jax.numpy_rank_promotion("allow"):
        return call(floats, arrays["dout"])


def plain_results(arrays, options):
    with jax.enable_x64(True):
        exact = {name: np.float64(x) for name, x in arrays.items()}
        return results(functools.partial(plain, **options), exact)


def assert_right(arrays, wafer, algorithm, want=None, **options):
    got = results(
        functools.partial(wk.attention, algorithm=algorithm, wafer=wafer, **options), arrays
    )
    want = plain_results(arrays, options) if want is None else want
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


B, T, S, N, K, H = SIZES = (2, 19, 19, 16, 16, 4)
CASES: dict[str, tuple[dict, dict]] = {
    "window, cap, sinks, segments": (
        {"sinks": True},
        {"causal": True, "window": 6, "soft_cap": 2.0, "segment_ids": segment_ids_of(B, T)},
    ),
    "causal, cap, sinks, segments": (
        {"sinks": True},
        {"causal": True, "soft_cap": 2.0, "segment_ids": segment_ids_of(B, T)},
    ),
    "window, bias of each score": ({"bias": (B, N, T, S)}, {"causal": True, "window": 8}),
    "bias of rows or columns": ({"bias": (1, 1, S)}, {}),
    "bias of heads, and rows that see no key": (
        {"bias": (N, T, 1)},
        {"segment_ids": (segment_ids_of(B, T), segment_ids_of(B, S) + 1), "soft_cap": 3.0},
    ),
}


@functools.cache
def plain_results_of(name):
    """The plain results of a case, which are the same on every wafer."""
    arrays, options = CASES[name]
    return plain_results(operands(*SIZES, **arrays), options)


def check(name, wafer, algorithm):
    arrays, options = CASES[name]
    assert_right(operands(*SIZES, **arrays), wafer, algorithm, plain_results_of(name), **options)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("ring", name) for name in list(CASES)[::2]]
    + [("allgather", list(CASES)[0]), ("ulysses", list(CASES)[4])],
)
def test_rules_hold_on_every_kind_of_wafer(full_wafer, algorithm, name):
    check(name, full_wafer, algorithm)


@every
@pytest.mark.parametrize("name", list(CASES)[1::2])
def test_rules_hold_on_devices(algorithm, name):
    check(name, wk.Wafer.devices(2, 4), algorithm)


@pytest.mark.parametrize("name", CASES)
def test_rules_hold_without_a_wafer(name):
    check(name, None, "auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("ring", name) for name in CASES] + [("allgather", name) for name in list(CASES)[::2]],
)
def test_rules_hold_in_blocks_of_few_heads(monkeypatch, algorithm, name):
    """And windows in bands of keys, of which a tile has more."""
    monkeypatch.setattr(plan, "_BLOCK", 4)
    monkeypatch.setattr(plan, "_NARROW", 3)
    check(name, wk.Wafer.devices(2, 2), algorithm)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes_and_windows(data):
    number = lambda most: data.draw(st.integers(1, most))  # noqa: E731
    B, T, K, group = number(3), number(12), number(4), number(3)
    S = data.draw(st.sampled_from([T, number(12)]))
    options = {"causal": True, "window": data.draw(st.sampled_from([None, number(14)]))}
    algorithm = data.draw(st.sampled_from(["ring", "allgather"]))
    wafer = wk.Wafer.devices(2, 2, 2)
    assert_right(operands(B, T, S, K * group, K, 2, sinks=True), wafer, algorithm, **options)


HIDDEN = np.zeros((4, 8, 3), np.float32)  # a bias that hides all keys of row 5, and of head 1
HIDDEN[1], HIDDEN[:, 5], HIDDEN[0, 0, 1] = -np.inf, -np.inf, -np.inf
NONE_SEEN: dict[str, tuple[dict, dict, np.ndarray]] = {  # and which rows of which heads see none
    "segments without a partner": (
        {},
        {"segment_ids": (jnp.array([[0] * 5 + [7] * 3]), jnp.zeros((1, 3), jnp.int32))},
        np.tile(np.arange(8) > 4, (4, 1)),
    ),
    "a window beyond the last key": (
        {},
        {"causal": True, "window": 2},
        np.tile(np.arange(8) > 3, (4, 1)),
    ),
    "a window, and sinks": (
        {"sinks": np.array([1.0, -np.inf, 0.0, 3.0], np.float32)},
        {"causal": True, "window": 2},
        np.tile(np.arange(8) > 3, (4, 1)),
    ),
    "a bias of -inf": ({"bias": HIDDEN}, {}, (HIDDEN == -np.inf).all(-1)),
    "a bias of -inf, causal": ({"bias": HIDDEN}, {"causal": True}, (HIDDEN == -np.inf).all(-1)),
}


@pytest.mark.parametrize("name", NONE_SEEN)
def test_a_row_that_sees_no_key_is_zeros_in_value_and_gradient(name, wafer_called):
    """On every kind of wafer, on one PE, and without a wafer."""
    more, options, empty = NONE_SEEN[name]
    arrays = operands(1, 8, 3, 4, 2, 4) | more
    want = results(functools.partial(plain, **options), arrays)
    places = [(None, "auto"), ("1x1", "auto"), ("2x2", "ring"), ("virtual-2x4", "allgather")]
    for grid, algorithm in places:
        wafer = None if grid is None else wafer_called(grid)
        options_there: dict[str, Any] = options | {"algorithm": algorithm, "wafer": wafer}
        got = results(functools.partial(wk.attention, **options_there), arrays)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)
        assert not np.asarray(got[0])[0].swapaxes(0, 1)[empty].any()


def test_lengths_that_blocks_do_not_divide_need_no_wafer(monkeypatch):
    """Rows that only fill up the last block are cut off again."""
    monkeypatch.setattr(plan, "_BLOCK", 8)
    options = {"causal": True, "soft_cap": 2.0}
    assert_right(operands(1, 17, 17, 2, 1, 4, sinks=True), None, "auto", **options)


def test_a_window_sends_only_what_it_sees():
    def words(window):
        x = jax.ShapeDtypeStruct((1, 64, 8, 4), jnp.float32)
        run = functools.partial(wk.attention, causal=True, window=window, algorithm="ring")
        return wk.traffic(run, x, x, x, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8))

    tile = 2 * 8 * 4  # words of keys and values
    for window, tiles in ((1, 1), (8, 2), (9, 2), (10, 3), (64, 8)):
        assert (words(window).words, words(window).steps) == ((tiles - 1) * tile, tiles - 1)


def test_zigzag_sends_nothing_but_its_relayout_more():
    x = jax.ShapeDtypeStruct((1, 64, 8, 4), jnp.float32)
    run = functools.partial(wk.attention, causal=True, algorithm="ring")
    got = wk.traffic(run, x, x, x, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8))
    Q, KV = 8 * 4, 2 * 8 * 4
    assert got.words == Q + 7.5 * KV and got.steps == 7 + 2


def test_ulysses_sends_tiles_once():
    x = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    run = functools.partial(wk.attention, causal=True, algorithm="ulysses")
    got = wk.traffic(run, x, x, x, wafer=wk.Wafer.abstract(wk.WSE3, 8, 8))
    Q, KV = 8 * 8 * 4, 2 * 8 * 8 * 4
    assert got.words == (2 * Q + KV) * 7 / 8 and got.steps == 2


def test_auto_says_why():
    def explain(shape, wafer):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return wk.attention.explain(x, x, x, causal=True, wafer=wafer)

    wafer = wk.Wafer.devices(4, 2)
    assert explain((1, 8, 8, 4), wafer).algorithm == "allgather"
    assert explain((1, 2**16, 8, 64), wafer).algorithm == "ulysses"
    on_a_line = explain((1, 2048, 8, 64), wk.Wafer.devices(8, 1))
    assert on_a_line.algorithm == "ulysses" and "would copy 8 MiB" in on_a_line.why
    assert explain((1, 2048, 6, 64), wk.Wafer.devices(8, 1)).algorithm == "allgather"
    assert explain((1, 2**16, 6, 64), wafer).why.endswith("6 heads do not divide by 8 PEs")
    on_wse = explain((1, 2**16, 8, 64), wk.Wafer.abstract(wk.WSE3, 4, 2))
    assert on_wse.algorithm == "zigzag"
    assert str(on_wse).startswith(f"attention on {on_wse.wafer}: zigzag, ")
    alone = explain((1, 8, 8, 4), None)
    assert (alone.algorithm, alone.candidates) == ("plain", {})


@pytest.mark.parametrize("grid", [(4, 2), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("ring", {}),
        ("ring", {"causal": True, "window": 9}),
        ("zigzag", {"causal": True}),
        ("allgather", {"causal": True}),
        ("ulysses", {}),
    ],
)
@pytest.mark.parametrize("segments", [False, True], ids=["", "segments"])
def test_explains_the_words_and_steps_that_its_programs_take(grid, algorithm, options, segments):
    q, k = (jax.ShapeDtypeStruct((2, 32, n, 4), jnp.float32) for n in (16, 8))
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32) if segments else None
    wafer = wk.Wafer.abstract(wk.WSE3, *grid)

    def run(q, k, v, ids):
        name: Any = "ring" if algorithm == "zigzag" else algorithm
        return wk.attention(q, k, v, segment_ids=ids, algorithm=name, **options)

    traffic = wk.traffic(run, q, k, k, ids, wafer=wafer)
    explained = wk.attention.explain(q, k, k, segment_ids=ids, wafer=wafer, **options)
    candidate = explained.candidates[algorithm]
    assert not candidate.refused
    assert (candidate.words, candidate.steps) == (traffic.words, traffic.steps)


def test_explains_why_an_algorithm_cannot_serve():
    q = jax.ShapeDtypeStruct((1, 32, 6, 4), jnp.float32)
    bias = jax.ShapeDtypeStruct((6, 1, 1), jnp.float32)
    wafer = wk.Wafer.devices(2, 2)

    def refusals(**options):
        candidates = wk.attention.explain(q, q, q, wafer=wafer, **options).candidates
        return {name: c.refused for name, c in candidates.items() if c.refused}

    ulysses = {"ulysses": "6 heads do not divide by 4 PEs"}
    assert refusals() == ulysses | {"zigzag": "for causal attention only"}
    assert refusals(causal=True, bias=bias)["zigzag"] == "a bias is served by the ring in order"
    assert set(refusals(is_causal=True)) == {"ulysses", "ring"}


@pytest.mark.parametrize(
    ("algorithm", "mark"),
    [("auto", "<- auto"), ("ring", "<- asked for"), ("ulysses", "<- asked for")],
)
def test_the_explanation_marks_one_row_and_says_who_chose(algorithm, mark):
    q = jax.ShapeDtypeStruct((1, 32, 8, 4), jnp.float32)
    explained = wk.attention.explain(q, q, q, wafer=wk.Wafer.devices(2, 2), algorithm=algorithm)
    (marked,) = [line for line in str(explained).splitlines() if "<-" in line]
    assert marked.split()[0] == explained.algorithm and marked.endswith(mark)
    assert algorithm in ("auto", explained.algorithm)


def test_explain_declares_the_keywords_of_attention():
    call, explain = inspect.signature(wk.attention), inspect.signature(wk.attention.explain)
    assert {name: p.default for name, p in explain.parameters.items()} == {
        name: p.default for name, p in call.parameters.items()
    }
    x = jax.ShapeDtypeStruct((1, 8, 4, 4), jnp.float32)
    misspelled: dict[str, Any] = {"casual": True}
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        wk.attention.explain(x, x, x, **misspelled)


def test_attention_is_a_function_with_an_explanation():
    assert inspect.isfunction(wk.attention)
    assert list(inspect.signature(wk.attention).parameters)[:4] == ["q", "k", "v", "causal"]
    assert "zig-zag order" in str(inspect.getdoc(wk.attention))
    assert "bias" in typing.get_type_hints(wk.attention)


def test_causal_has_jaxs_name_too():
    arrays = operands(1, 8, 8, 4, 4, 4)
    q, k, v = (jnp.asarray(arrays[name]) for name in "qkv")
    for wafer in (None, wk.Wafer.devices(2, 2)):
        run = functools.partial(jax.jit, static_argnames=("causal", "is_causal"))(
            functools.partial(wk.attention, wafer=wafer)
        )
        want = run(q, k, v, causal=True)
        np.testing.assert_array_equal(run(q, k, v, is_causal=True), want)
        np.testing.assert_array_equal(run(q, k, v, causal=True, is_causal=True), want)
        np.testing.assert_array_equal(run(q, k, v, is_causal=False), run(q, k, v))
    for causal in (True, False):
        other = not causal
        message = f"causal={causal} and is_causal={other} name one keyword twice"
        with pytest.raises(ValueError, match=message):
            wk.attention(q, k, v, causal=causal, is_causal=other)
        with pytest.raises(ValueError, match=message):
            wk.attention.explain(q, k, v, causal=causal, is_causal=other)
    for name in ("causal", "is_causal"):
        option: dict[str, Any] = {name: "yes"}
        with pytest.raises(ValueError, match=f"attention: {name}='yes' must be True or False"):
            wk.attention(q, k, v, **option)


@pytest.mark.parametrize("algorithm", [None, "ring", "allgather", "ulysses"])
def test_every_product_has_the_precision_asked_for(algorithm):
    """Forward and backward; without a wafer too."""
    arrays = operands(1, 8, 8, 8, 4, 4)
    wafer = wk.Wafer.devices(2, 2) if algorithm else None

    @functools.partial(jax.jit, static_argnames="precision")
    def gradients(q, k, v, precision):
        run = functools.partial(wk.attention, causal=True, precision=precision, wafer=wafer)
        return jax.grad(lambda *x: run(*x, algorithm=algorithm or "auto").sum(), (0, 1, 2))(q, k, v)

    operation = re.compile(r"stablehlo.dot_general.*")
    for precision, stated in (("highest", "HIGHEST"), (None, "DEFAULT")):
        program = gradients.lower(*(arrays[n] for n in "qkv"), precision=precision).as_text()
        products = operation.findall(program)
        assert len(products) >= 5
        assert all(f"precision = [{stated}, {stated}]" in p for p in products)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0, "causal": True}, "window=0 must be 1 or more"),
        ({"window": 2}, "window=2 looks back from each query; it needs causal=True"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"sinks": np.zeros(3)}, r"sinks is \(3,\), it must be \(6,\)"),
        ({"bias": np.zeros((5, 8))}, r"bias is \(5, 8\), it must broadcast to \(1, 6, 8, 8\)"),
        ({"segment_ids": np.zeros((8, 1), int)}, r"segment_ids is \(8, 1\) for queries of \(1, 8"),
        ({"segment_ids": np.zeros((1, 8))}, "segment_ids are float64; cast them to int32"),
        ({"algorithm": "ulysses"}, "6 do not divide by them; 'ring' and 'allgather' can serve it"),
    ],
)
def test_refuses(options, message):
    q = jnp.ones((1, 8, 6, 4))
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        wk.attention(q, q, q, wafer=wk.Wafer.devices(2, 2), **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_without_a_wafer(dtype):
    """On CPUs too, which lack some of the products in 16 bits; with their gradients."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 6, heads, 4)).astype(dtype)
        for i, heads in enumerate((4, 2, 2))
    )
    for options in ({"causal": True}, {"causal": True, "soft_cap": 2.0}):
        loss = lambda q, k, v, options=options: (  # noqa: E731
            (wk.attention(q, k, v, **options).astype(jnp.float32) ** 2).sum()
        )
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        got, want = run(q, k, v), run(*(x.astype(jnp.float32) for x in (q, k, v)))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.float32(x), y, rtol=0.05, atol=0.05 * np.abs(y).max())
