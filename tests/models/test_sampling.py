"""The choice of the next token from logits that are extreme."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.sampling import Sampling, choose, sequence_keys

KEYS = sequence_keys(jax.random.key(0), jnp.arange(4))


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-30, 1e-6])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_temperature_near_0_takes_the_likeliest(temperature, limits):
    """A quotient of the logits themselves would be infinite, and infinity less infinity NaN."""
    logits = jnp.array(
        [[-3.0, 2.0, 1.0, 0.0], [9e4, -9e4, 0, 1], [-np.inf, -5, -4, -9], [1, 2, 4, 3]]
    )
    run = jax.jit(lambda logits: choose(logits, KEYS, Sampling(temperature=temperature, **limits)))
    np.testing.assert_array_equal(run(logits), [1, 0, 2, 2])


def test_a_token_that_is_ruled_out_is_never_drawn():
    """Also where the temperature is beyond float32, and all allowed tokens are equally likely."""
    logits = jnp.full((4, 16), -jnp.inf).at[:, 3].set(0.0).at[:, 5].set(-80.0)
    hot = Sampling(temperature=1e39)
    run = jax.jit(lambda seed: choose(logits, jax.random.split(jax.random.key(seed), 4), hot))
    assert set(np.concatenate([run(seed) for seed in range(8)]).tolist()) == {3, 5}
