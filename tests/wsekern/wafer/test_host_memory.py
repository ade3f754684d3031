"""Memory of virtual wafers: stated before it is taken, refused with the figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.wafer import host_memory

GRID = P("y", "x")
MB = 2**20


def on_virtual(kernel, out=GRID):
    return wk.Wafer.virtual(wk.WSE2, 8, 8).map(kernel, in_specs=GRID, out_specs=out)


def spread(u):
    return jnp.broadcast_to(fabric.varying(u)[..., None], (*u.shape, 64)) * 2.0


@pytest.fixture
def little(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 10 * MB)
    monkeypatch.setattr(host_memory, "_SMALL_BYTES", 0)


def test_a_figure_is_told_of_shapes_alone():
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    wafer = wk.Wafer.virtual(wk.WSE2, 8, 8)
    needs = wk.memory(lambda u: wk.matmul(u, u), shape, wafer=wafer)
    assert needs.arguments == needs.results == 4 * MB
    assert needs.temporaries > 0 and needs.total < 64 * MB and needs.fits
    assert "available (arguments 4.19 MB, results 4.19 MB, temporaries" in str(needs)


def test_what_does_not_fit_is_refused_with_the_figure(little):
    u = np.ones((256, 256), np.float32)
    with pytest.raises(ValueError, match="8x8 virtual PEs needs 16.8 MB beside its .* 262 kB, and"):
        on_virtual(spread, P("y", "x", None))(u)
    with pytest.raises(ValueError, match="at least 17 MB, .* this machine has 10.5 MB available"):
        jax.jit(on_virtual(spread, P("y", "x", None)))(u)
    # Temporaries count too: two results' worth, of which one is freed.
    assert on_virtual(lambda u: fabric.shift(u, "y"))(u).shape == (256, 256)
    needs = wk.memory(on_virtual(spread, P("y", "x", None)), u)
    assert not needs.fits and needs.results == 16 * MB and "of 10.5 MB available" in str(needs)


def test_a_shape_is_looked_into_once(monkeypatch):
    programs = []

    def bytes_needed(*program):
        programs.append(program)
        return 0

    monkeypatch.setattr(host_memory, "bytes_needed", bytes_needed)
    run = on_virtual(lambda u: u * 3.0)
    for size in (8, 8, 16, 8):
        run(np.ones((size, size), np.float32))
    assert len(programs) == 2


def test_what_is_available_is_known_here():
    room = host_memory.available()
    assert room is None or 0 < room < 2**50


def test_refuses_an_abstract_wafer():
    with pytest.raises(ValueError, match="never runs; wk.estimate says what a PE"):
        wk.memory(jnp.sin, 1.0, wafer=wk.Wafer.abstract(wk.WSE2, 2, 2))
