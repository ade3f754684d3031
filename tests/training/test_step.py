"""A training step: the same losses on every wafer, and equal to its definition in optax."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import wsekern as wk
from models.config import DecoderConfig
from models.decoder import Decoder
from sharding.state import named_leaves
from training.config import TrainingConfig
from training.plan import make_plan
from training.programs import compile_programs, step_program
from training.step import initial_state, mean_loss, train_step

SIZES = DecoderConfig(
    vocab=32, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, context=16, tied=True
)
RNG = np.random.default_rng(0)
# Sequences that count upwards: easy to learn.
DATA = ((RNG.integers(0, 32, (20, 8, 1)) + np.arange(17)) % 32).astype(np.int32)


def losses_of(wafer, steps=20, sizes=SIZES, **changes):
    config = TrainingConfig(batch=8, context=16, steps=20, warmup=5, learning_rate=1e-2, **changes)
    programs = compile_programs(make_plan(config, sizes, wafer))
    state, losses = programs.first_state(), []
    for batch in DATA[:steps]:
        pair = programs.put(batch[:, :-1]), programs.put(batch[:, 1:])
        state, metrics = programs.step(state, *pair)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.fixture(scope="module")
def alone():
    return losses_of(wk.Wafer.devices(1, 1))


@pytest.mark.parametrize(
    ("backend", "height", "width", "wafers"),
    [
        ("devices", 2, 4, 1),
        ("devices", 2, 2, 2),
        ("virtual", 4, 4, 1),
        pytest.param("devices", 3, 3, 1, marks=pytest.mark.slow),
    ],
)
def test_the_same_losses_on_every_wafer(alone, backend, height, width, wafers):
    if backend == "virtual":
        wafer = wk.Wafer.virtual(wk.WSE2, height, width, wafers)
    else:
        wafer = wk.Wafer.devices(height, width, wafers)
    np.testing.assert_allclose(losses_of(wafer), alone, atol=2e-4)
    assert alone[-1] < alone[0]


def test_accumulation_changes_memory_not_losses(alone):
    np.testing.assert_allclose(
        losses_of(wk.Wafer.devices(2, 2, 2), steps=6, microbatch=4), alone[:6], atol=2e-5
    )


@pytest.mark.parametrize(
    ("changed", "remat"),
    [({}, False), ({"vocab": 33, "d_model": 30, "d_ff": 47, "heads": 3, "kv_heads": 3}, True)],
    ids=["even", "padded"],
)
def test_a_state_split_over_wafers_has_the_same_losses(changed, remat):
    """Padded for more PEs, gathered a layer at a time, and split still after the steps."""
    sizes = dataclasses.replace(SIZES, **changed)
    wafer, changes = wk.Wafer.devices(2, 2, 2), {"sizes": sizes, "steps": 3, "remat": remat}
    split, want = (losses_of(wafer, split_state=s, **changes) for s in (True, False))
    np.testing.assert_allclose(split, want, atol=2e-5)


def test_a_split_state_lies_on_one_wafer_each():
    wafer = wk.Wafer.devices(2, 2, 2)
    config = TrainingConfig(batch=8, context=16, split_state=True)
    plan = make_plan(config, SIZES, wafer)
    state = compile_programs(plan).first_state()
    for name, leaf in named_leaves(state).items():
        if name.endswith(("/weight", "/embedding")):
            value = leaf.get_value()
            assert value.addressable_shards[0].data.size * wafer.size == value.size, name


def test_only_one_layer_of_a_split_state_is_gathered_at_a_time():
    wafer = wk.Wafer.devices(2, 2, 2)
    sizes = dataclasses.replace(SIZES, layers=6)
    config = TrainingConfig(batch=8, context=16, split_state=True, remat=True)
    function, shapes, options = step_program(make_plan(config, sizes, wafer))
    with wafer:
        text = jax.jit(function, **options).lower(*shapes).compile().as_text() or ""
    gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)
    assert any(shape == "f32[16,24]" for shape in gathered), gathered  # a layer's d_model by d_ff
    assert not any(shape.startswith("f32[6,") for shape in gathered), gathered


def test_a_step_is_optax_on_the_gradient_of_the_mean_loss():
    """The definition, without wafer, layout or compiled programs."""
    make_model = lambda rngs: Decoder(SIZES, rngs=rngs)  # noqa: E731
    optimizer = optax.adamw(1e-2)
    state = initial_state(make_model, optimizer, 0)
    graph = nnx.graphdef(make_model(nnx.Rngs(0)))
    pair = DATA[0][:, :-1], DATA[0][:, 1:]
    after, metrics = jax.jit(train_step(graph, optimizer))(state, *pair)
    gradient = jax.jit(jax.grad(lambda p: mean_loss(graph, p, *pair)))(state["params"])
    updates, _ = optimizer.update(gradient, state["optimizer"], state["params"])
    wanted = optax.apply_updates(state["params"], updates)
    for got, want in zip(*map(jax.tree.leaves, (after["params"], wanted)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert int(after["step"]) == 1
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(np.log(SIZES.vocab), abs=0.1)


def test_bfloat16_keeps_float32_weights_and_nearly_the_losses(alone):
    low = losses_of(wk.Wafer.devices(2, 4), steps=10, dtype="bfloat16")
    np.testing.assert_allclose(low, alone[:10], atol=0.03)


def test_sizes_that_do_not_divide_by_the_grid_train_on_any_wafer():
    odd = dataclasses.replace(SIZES, vocab=33, d_model=30, d_ff=47, heads=3, kv_heads=3)
    want = losses_of(wk.Wafer.devices(1, 1), steps=5, sizes=odd)
    np.testing.assert_allclose(
        losses_of(wk.Wafer.devices(2, 4), steps=5, sizes=odd), want, atol=2e-4
    )
