"""The wave example: equal on every wafer, the speed of sound, draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def wave(example_called):
    return example_called("wave")


def test_shot_and_gradient_are_those_of_one_device(wave, full_wafer):
    rock = wave.ground(32)

    def energy(velocity):
        record = wave.shot(velocity, 20)[1]
        return (record**2).sum(), record

    both = jax.jit(jax.grad(energy, has_aux=True))
    want_gradient, want = both(rock)
    with full_wafer:
        gradient, record = both(rock)
        again = wave.sensitivity(rock, np.zeros_like(want))
    scale = abs(want_gradient).max()
    np.testing.assert_allclose(record, want, atol=1e-5 * abs(want).max())
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-5 * scale)
    np.testing.assert_allclose(2 * again, want_gradient, atol=1e-5 * scale)


def test_sound_travels_at_its_speed(wave):
    """In uniform rock, along the surface: the pulse arrives later farther away."""
    speed, near, far = 2000.0, 10, 20
    rock = jnp.full((56, 56, 28), speed, jnp.float32)
    record = np.asarray(jax.jit(lambda v: wave.shot(v, 220)[1])(rock))
    loudest = [abs(record[:, 28 + away]).argmax() * wave.STEP for away in (near, far)]
    assert abs(loudest[1] - loudest[0] - (far - near) * wave.SPACING / speed) < 0.003


def test_it_draws_and_estimates(wave, run, tmp_path, capsys):
    picture, film = tmp_path / "wave.png", tmp_path / "wave.gif"
    size = ["--cells", 32, "--steps", 12]
    run(wave, "--virtual", "2x2", *size, "--out", picture, "--film", film)
    assert picture.stat().st_size > 10_000 and film.stat().st_size > 5_000
    run(wave, "--estimate", "4x4", *size)
    assert "cycles" in capsys.readouterr().out
