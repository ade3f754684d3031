"""The sea of `examples/shallow_water.py` on whole arrays: a peer for `shallow_water`."""

from typing import Any

import jax.numpy as jnp


def step(sea: dict[str, Any], land: dict[str, Any], sizes: Any, first: Any) -> dict[str, Any]:
    """One time step of fields `[height, length]`; walls are rows of zeros.

    Args:
      sea: the fields, as in the example.
      land: the coefficients, as in the example.
      sizes: the example's module, for its constants.
      first: whether it is the first step.
    """
    d, g = sizes.SPACING, sizes.GRAVITY
    eta, u, v = sea["eta"], sea["u"], sea["v"]
    h = land["depth"] + eta
    fe = 0.5 * (h + _east(h)) * u
    fn = _shut(0.5 * (h + _north(h)) * v)
    corner = 0.25 * (h + _east(h) + _north(h) + _east(_north(h)))
    q = (land["f"] + (_east(v) - v) / d - (_north(u) - u) / d) / corner
    ke = 0.25 * (u**2 + _west(u) ** 2 + v**2 + _south(v) ** 2)
    change = {
        "deta": -(fe - _west(fe)) / d - (fn - _south(fn)) / d,
        "du": -g * (_east(eta) - eta) / d
        - (_east(ke) - ke) / d
        + 0.25 * (q * (fn + _east(fn)) + _south(q) * (_south(fn) + _east(_south(fn)))),
        "dv": -g * (_north(eta) - eta) / d
        - (_north(ke) - ke) / d
        - 0.25 * (q * (fe + _north(fe)) + _west(q) * (_west(fe) + _north(_west(fe)))),
    }
    new, old = jnp.where(first, 1.0, sizes.NEW), jnp.where(first, 0.0, sizes.OLD)
    eta, u, v = (
        a + sizes.STEP * (new * change[name] + old * sea[name])
        for name, a in (("deta", eta), ("du", u), ("dv", v))
    )
    v = _shut(v)

    def with_friction(a, u):
        fe = sizes.VISCOSITY * (_east(a) - u) / d
        fn = _shut(sizes.VISCOSITY * (_north(a) - u) / d)
        return a + sizes.STEP * ((fe - _west(fe)) / d + (fn - _south(fn)) / d)

    u = with_friction(u, u)
    return {"eta": eta, "u": u, "v": with_friction(v, u)} | change


def _east(a):
    return jnp.roll(a, -1, 1)


def _west(a):
    return jnp.roll(a, 1, 1)


def _north(a):
    return jnp.concatenate([a[1:], a[-1:]])


def _south(a):
    return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])


def _shut(a):
    return a.at[-1].set(0)
