"""Steps that compute the inside of a tile while its halo is on the way."""

import functools

import jax
import numpy as np

import wsekern as wk
from tests.wsekern.kernels.stencil.test_stencil import field, run, weighted


def shapes_before_it_arrives(jaxpr):
    """Shapes of the products that need no halo, in the jaxpr that has the exchange."""
    names = [equation.primitive.name for equation in jaxpr.eqns]
    if "ppermute" not in names:
        inner = [getattr(v, "jaxpr", v) for e in jaxpr.eqns for v in e.params.values()]
        nested = (shapes_before_it_arrives(j) for j in inner if hasattr(j, "eqns"))
        return next((shapes for shapes in nested if shapes), set())
    waits: set = set()
    shapes: set = set()
    for equation in jaxpr.eqns:
        late = any(v in waits for v in equation.invars if not hasattr(v, "val"))
        if equation.primitive.name == "ppermute" or late:
            waits.update(equation.outvars)
        elif equation.primitive.name == "mul":
            shapes.update(v.aval.shape for v in equation.outvars if v.aval.ndim == 2)
    return shapes


def test_the_inside_of_a_tile_does_not_wait_for_the_halo():
    u = jax.ShapeDtypeStruct((32, 32), np.float32)
    go = functools.partial(wk.stencil, update=weighted, radius=1, wafer=wk.Wafer.devices(2, 4))
    shapes = {
        overlap: shapes_before_it_arrives(
            jax.make_jaxpr(functools.partial(go, overlap=overlap))(u).jaxpr
        )
        for overlap in (True, False, None)
    }
    assert (14, 6) in shapes[True]
    assert shapes[False] == shapes[None] == set()  # on CPU nothing travels meanwhile


def test_overlap_changes_nothing(wafer_called):
    options = {"steps": 5, "boundary": ["fixed", "reflect"]}
    got = run(field((31, 30)), depth=2, overlap=True, wafer=wafer_called("2x4"), **options)
    np.testing.assert_allclose(got, run(field((31, 30)), **options), rtol=1e-6, atol=1e-6)
