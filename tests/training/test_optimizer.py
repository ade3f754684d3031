"""The learning rate by step, which parameters decay, and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import Decoder
from models.families.llama import NANO
from sharding.state import named_leaves
from training.config import TrainingConfig
from training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONFIG = TrainingConfig(steps=100, warmup=10, learning_rate=1.0, min_learning_rate=0.1)


def rates_by_step(**changes):
    rate = learning_rate_schedule(dataclasses.replace(CONFIG, **changes))
    return np.array([float(rate(step)) for step in range(101)])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_every_schedule_rises_from_zero_to_the_highest_rate(kind):
    rates = rates_by_step(schedule=kind)
    np.testing.assert_allclose(rates[:11], np.arange(11) / 10, rtol=1e-6)
    assert rates.max() == 1


def test_cosine_falls_to_the_final_rate():
    rates = rates_by_step()
    turn = np.pi * np.arange(91) / 90
    np.testing.assert_allclose(rates[10:], 0.1 + 0.9 * (1 + np.cos(turn)) / 2, rtol=1e-5)


def test_wsd_is_constant_then_linear_to_the_final_rate():
    rates = rates_by_step(schedule="wsd", decay_fraction=0.3)
    assert (rates[10:71] == 1).all()
    np.testing.assert_allclose(rates[70:], np.linspace(1, 0.1, 31), rtol=1e-5)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    np.testing.assert_allclose(rates_by_step(warmup=1000)[:100], np.arange(100) / 100, rtol=1e-6)


def test_no_warm_up_starts_at_the_highest_rate():
    assert rates_by_step(warmup=0)[0] == 1


def test_matrices_decay_and_norms_do_not():
    params = jax.eval_shape(lambda: nnx.state(Decoder(NANO, rngs=nnx.Rngs(0))))
    decays = {name: leaf.get_value() for name, leaf in named_leaves(decay_mask(params)).items()}
    assert decays["embedding"] and decays["stages/0/blocks/0/attention/query/weight"]
    assert not decays["norm/scale"] and not decays["stages/0/blocks/0/attention_norm/scale"]


def update_of(gradient, **changes):
    param = nnx.Param(jnp.array([[2.0, 0.0]]), axes=("in", "out"))
    optimizer = make_optimizer(dataclasses.replace(CONFIG, warmup=0, **changes))
    state = {"w": param}

    @jax.jit
    def update(state, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(state), state)
        return updates["w"][...]

    return np.asarray(update(state, {"w": param.replace(jnp.array(gradient))}))


def test_an_update_is_adams_and_the_decay():
    """Adam's first step is the gradient's sign; decay subtracts a share of the parameter."""
    np.testing.assert_allclose(update_of([[0.5, 0.0]], weight_decay=0.1), [[-1.2, 0]], atol=1e-6)


def test_a_zero_parameter_without_gradient_stays_zero():
    assert (update_of([[0.5, 0.0]])[:, 1] == 0).all()


def test_gradients_are_clipped_to_the_global_norm():
    """Adam ignores a factor of the gradient, except beside its epsilon, 1e-8."""
    tiny = update_of([[1.0, 0.0]], clip_norm=1e-8, weight_decay=0.0)
    np.testing.assert_allclose(tiny, [[-0.5, 0]], atol=1e-3)
    np.testing.assert_allclose(
        update_of([[1.0, 0.0]], clip_norm=0.0, weight_decay=0.0), [[-1, 0]], atol=1e-6
    )
