"""A mixture of experts against the dense loop over all of them, on every kind of wafer."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk

B, T, D, F, E, k = 2, 6, 10, 7, 6, 3


def tanh_gate(gate, up):
    return jnp.tanh(gate) * (up + 1)


def operands(biased=True, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 12))
    normal = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    biases = (normal(E, F), normal(E, F), normal(E, D)) if biased else None
    scores = normal(B, T, E).at[..., 4].set(-9.0)  # an expert that nobody chooses
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores), k)
    return normal(B, T, D), chosen, shares, weights, biases


def dense(x, chosen, shares, weights, biases):
    """Every expert on every token."""
    (gate, up, down), total = weights, 0
    for e in range(E):
        g, u = x @ gate[e], x @ up[e]
        if biases is not None:
            g, u = g + biases[0][e][None, None], u + biases[1][e][None, None]
        y = tanh_gate(g, u) @ down[e]
        y = y if biases is None else y + biases[2][e][None, None]
        total = total + y * (shares * (chosen == e)).sum(-1, keepdims=True)
    return total


def value_and_gradients(operation):
    def loss(x, shares, weights, biases, chosen):
        out = operation(x, chosen, shares, weights, biases)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


def experts(*operands):
    return wk.experts(*operands, activation=tanh_gate)


@pytest.mark.parametrize("biased", [True, False])
def test_it_is_the_dense_loop_over_experts(biased):
    x, chosen, shares, weights, biases = operands(biased)
    check(value_and_gradients(experts), x, shares, weights, biases, chosen)


@pytest.mark.parametrize("grid", ["1x4", "4x1", "2x4", "2of2x2", "virtual-4x4", "virtual-2of2x2"])
@pytest.mark.parametrize("way", ["all experts", "some experts at a time", "weights stay"])
def test_on_every_wafer_with_its_gradients(grid, way, wafer_called, monkeypatch):
    module = importlib.import_module("wsekern.kernels.experts.experts")
    if way == "some experts at a time":
        monkeypatch.setattr(module, "_MOST_GATHERED", 100)
    if way == "weights stay":
        monkeypatch.setattr(module, "_FEW_WORDS", 0)
    x, chosen, shares, weights, biases = operands()
    # Another activation makes another program: one that is kept would not see what is patched.
    activation = functools.partial(lambda gate, up, way: tanh_gate(gate, up), way=way)

    def operation(*operands):
        return wk.experts(*operands, activation=activation)

    with wafer_called(grid):
        check(value_and_gradients(operation), x, shares, weights, biases, chosen)


@pytest.mark.parametrize(("tokens", "gathers"), [(1, False), (512, True)], ids=["few", "many"])
def test_weights_move_only_to_many_tokens(tokens, gathers):
    wafer = wk.Wafer.devices(4, 2)
    shapes = [(2, tokens, 64), (2, tokens, 2), (2, tokens, 2)]
    x, chosen, shares = (
        jnp.ones(shape, dtype)
        for shape, dtype in zip(shapes, (jnp.float32, jnp.int32, jnp.float32), strict=True)
    )
    weights = tuple(jnp.ones(shape) for shape in ((32, 64, 48), (32, 64, 48), (32, 48, 64)))

    def run(x, chosen, shares, weights):
        return wk.experts(x, chosen, shares, weights, activation=tanh_gate, wafer=wafer)

    text = jax.jit(run).lower(x, chosen, shares, weights).as_text()
    assert bool(re.search(r"all_gather.*tensor<32x\d+x\d+xf32>", text)) == gathers


def check(program, x, shares, weights, biases, chosen):
    got = program(x, shares, weights, biases, chosen)
    want = value_and_gradients(dense)(x, shares, weights, biases, chosen)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("wafer", [None, wk.Wafer.devices(2, 2)], ids=["local", "wafer"])
def test_every_product_has_the_precision_asked_for(wafer):
    """Forward and backward."""
    x, chosen, shares, weights, biases = operands()
    for precision, stated in (("highest", "HIGHEST"), (None, "DEFAULT")):

        def run(*operands, precision=precision):
            return wk.experts(*operands, activation=tanh_gate, precision=precision, wafer=wafer)

        program = value_and_gradients(run).lower(x, shares, weights, biases, chosen).as_text()
        products = re.findall(r"stablehlo.dot_general.*", program)
        assert len(products) >= 9  # three forward, six backward
        assert all(f"precision = [{stated}, {stated}]" in p for p in products)


def test_a_choice_out_of_range_adds_nothing():
    x, chosen, shares, weights, biases = operands()
    some = chosen.at[0, :, 1].set(jnp.array([-1, E, 99, -7, 0, 1]))
    got = jax.jit(experts)(x, some, shares, weights, biases)
    np.testing.assert_allclose(got, dense(x, some, shares, weights, biases), atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("grid", ["1x1", "2x4", "2of2x2", "virtual-2of2x2"])
def test_a_choice_out_of_range_adds_nothing_whatever_its_share(grid, bad, wafer_called):
    """Nor does the last expert's bias, which stands in for a row without an expert."""
    x, chosen, shares, weights, biases = operands()
    chosen = jnp.where(chosen == E - 1, 0, chosen)
    sound = tuple(b.at[-1].set(0) for b in biases)
    others = (x, shares[..., ::2], weights, sound, chosen[..., ::2])
    (want_dx, want_dshares, *_), want = value_and_gradients(dense)(*others)
    biases = tuple(b.at[-1].set(bad) for b in biases)
    run = value_and_gradients(lambda *a: experts(*a))
    for out_of_range in (-1, -E, E, 2**20):
        elsewhere = chosen.at[..., 1].set(out_of_range)
        spoiled = (x, shares.at[..., 1].set(bad), weights, biases, elsewhere)
        with wafer_called(grid):
            (dx, dshares, *_), out = run(*spoiled)
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dshares[..., ::2], want_dshares, rtol=1e-4, atol=1e-4)
        assert not np.any(dshares[..., 1])


def test_what_is_not_finite_stays_with_its_expert():
    """A block of rows may run on into the next expert's, which must not count for this one."""
    x, _, shares, weights, _ = operands(biased=False)
    chosen = jnp.zeros((B, T, k), jnp.int32) + jnp.arange(k).reshape(1, 1, k)
    chosen = chosen.at[:, -1].set(jnp.arange(3, 6))
    x = x.at[:, -1].set(jnp.nan)

    def total(weights):
        return experts(x, chosen, shares, weights, None).sum()

    gradients = jax.jit(jax.grad(total))(weights)
    for dw in gradients:
        assert np.isfinite(dw[:3]).all() and np.isnan(dw[3:]).any()


def test_all_tokens_to_one_expert_and_short_dtypes():
    x, chosen, shares, weights, biases = operands(dtype=jnp.bfloat16)
    one = jnp.full((B, T, 1), 2)
    share = jnp.ones((B, T, 1), jnp.bfloat16)
    got = jax.jit(experts)(x, one, share, weights, biases)
    assert got.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, share, weights, biases))
    want = dense(wide[0], one, *wide[1:])
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.06 * abs(want).max())


def test_even_use_has_a_balance_loss_of_k():
    even = (jnp.arange(12)[:, None] + jnp.arange(k)[None]) % E
    assert jax.jit(wk.load_balance_loss)(jnp.full((12, E), 1 / E), even) == pytest.approx(k)
    first = jnp.zeros((12, 1), jnp.int32)
    certain = jax.nn.one_hot(first[:, 0], E)
    assert wk.load_balance_loss(certain, first) == pytest.approx(E)


def test_a_balance_loss_counts_no_padding(wafer_called):
    """7 tokens on 3 rows of PEs, as an operation before it has left them: cut from 9."""
    wafer, spec = wafer_called("3x3"), P(None, "y", None)
    scores = np.random.default_rng(0).normal(size=(2, 7, E)).astype(np.float32)
    kernel = wafer.map(lambda scores: 2 * scores, in_specs=spec, out_specs=spec)

    def loss(scores, of_wafer):
        if of_wafer:
            scores = wk.layout.pad(scores, spec, wafer, fill=3.0)
            scores = wk.layout.crop(kernel(scores), (2, 7, E), spec, wafer)
        else:
            scores = 2 * scores
        return wk.load_balance_loss(jax.nn.softmax(scores), jax.lax.top_k(scores, k)[1])

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for got, want in zip(run(scores, True), run(scores, False), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((T, D))}, r"x is \(6, 10\), it must be \[B, T, D\]"),
        ({"chosen": jnp.zeros((B, T, k))}, "chosen is float32; cast it to an integer"),
        ({"shares": jnp.zeros((B, T, 2))}, r"shares \(2, 6, 2\): both must be \(2, 6, k\)"),
        ({"x": jnp.zeros((B, T, 9))}, r"they must be \[E, 9, F\] twice"),
        ({"weights": tuple(w[:2] for w in operands()[3])}, "chooses 3 experts of 2"),
        ({"biases": operands()[4][:2]}, "biases are"),
        ({"x": jnp.zeros((B, T, D), jnp.bfloat16)}, "cast them to one floating dtype"),
    ],
)
def test_refuses(change, message):
    names = ("x", "chosen", "shares", "weights", "biases")
    changed = dict(zip(names, operands(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        experts(*changed.values())
