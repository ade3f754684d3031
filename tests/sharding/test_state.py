"""The layout and the padding of a train state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import wsekern as wk
from sharding.explain import explain_state, placement_table
from sharding.state import constrain, initialize, lay_out, logical, logical_shape, named_leaves, pad


class Pair(nnx.Module):
    """Sizes that divide by nothing."""

    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (7, 5)), axes=("vocab", "in"))
        self.scale = nnx.Param(jnp.ones(5), axes=("feature",))


def make():
    params = nnx.state(Pair(nnx.Rngs(0)))
    return {"step": jnp.zeros((), jnp.int32), "params": params, "moments": OPTIMIZER.init(params)}


OPTIMIZER = optax.adamw(1e-2)


def test_values_are_the_same_on_every_wafer(wafer):
    alone = named_leaves(initialize(make, None))
    laid_out = named_leaves(logical(initialize(make, wafer)))
    for name, leaf in alone.items():
        got, want = jax.tree.leaves(laid_out[name])[0], jax.tree.leaves(leaf)[0]
        np.testing.assert_allclose(jax.device_get(got), want, rtol=1e-6, err_msg=name)


def test_parameters_and_moments_lie_alike_and_padded():
    wafer = wk.Wafer.devices(2, 4)
    leaves = named_leaves(initialize(make, wafer))
    for name in ("params/table", "moments/0/mu/table", "moments/0/nu/table"):
        assert leaves[name].shape == (8, 6)
        assert logical_shape(leaves[name]) == (7, 5)
        assert leaves[name].get_value().sharding.spec == P("x", "y")
        assert leaves[name].get_value().addressable_shards[0].data.shape == (2, 3)
    assert leaves["step"].sharding.is_fully_replicated


def test_no_device_ever_holds_a_whole_array(as_shipped):
    """Initialization is one program whose largest value on a device is a tile of the parameters."""
    wafer = wk.Wafer.devices(4, 4)
    big = lambda: nnx.state(_Big(nnx.Rngs(0)))  # noqa: E731
    shardings = lay_out(jax.eval_shape(big), wafer)
    lowered = jax.jit(big, out_shardings=shardings).lower()
    memory = lowered.compile(compiler_options=as_shipped).memory_analysis()
    assert memory is not None
    whole = 512 * 512 * 4
    # Random bits take three tiles.
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 2


class _Big(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (512, 512)), axes=("in", "out"))


def test_the_padding_stays_zero_through_a_step(full_wafer):
    state = initialize(make, full_wafer)

    @jax.jit
    def step(state):
        loss = lambda p: (logical(p)["table"][...] ** 2).sum() + logical(p)["scale"][...].sum()  # noqa: E731
        grads = jax.grad(loss)(state["params"])
        updates, moments = OPTIMIZER.update(grads, state["moments"], state["params"])
        return optax.apply_updates(state["params"], updates), moments

    params, moments = step(state)
    for leaf in named_leaves({"params": params, "moments": moments}).values():
        if not isinstance(leaf, nnx.Variable):
            continue
        value = np.array(leaf.get_value())
        value[tuple(slice(0, n) for n in logical_shape(leaf))] = 0
        assert not value.any()


def test_explain_counts_bytes_and_padding():
    rows = {row.name: row for row in explain_state(jax.eval_shape(make), wk.Wafer.devices(2, 4))}
    row = rows["params/table"]
    assert (row.shape, row.spec, row.bytes_per_device) == ((7, 5), P("x", "y"), 2 * 3 * 4)
    assert row.padding == pytest.approx(48 / 35 - 1)
    assert rows["step"].bytes_per_device == 4
    assert placement_table(list(rows.values())).row_count == len(rows) + 1


def test_padding_twice_keeps_the_logical_shape():
    state = {"w": nnx.Param(jnp.ones((6, 5)), axes=("in", "out"))}
    twice = pad(pad(state, wk.Wafer.devices(4, 4)), wk.Wafer.devices(3, 3))
    assert twice["w"].shape == (9, 9)
    np.testing.assert_array_equal(logical(twice)["w"][...], 1)
    assert logical(twice)["w"].shape == (6, 5)


def test_a_variable_without_names_is_whole_everywhere():
    state = {"mean": nnx.BatchStat(jnp.ones(3))}
    assert initialize(lambda: state, wk.Wafer.devices(2, 4))["mean"].shape == (3,)


def test_what_lives_at_memoryx_is_padded_for_it():
    make = lambda: {"w": nnx.Param(jnp.ones((6, 5)), axes=("in", "out"))}  # noqa: E731
    state = initialize(make, wk.Wafer.devices(2, 2, 2), home="memoryx")
    assert state["w"].shape == (8, 6)


@pytest.mark.parametrize("size", [8, 6])
def test_a_constraint_leaves_values_and_splits_what_divides(size):
    wafer = wk.Wafer.devices(2, 2, 2)
    w = nnx.Param(jnp.arange(size * 4.0).reshape(size, 4), axes=("in", "out"))
    out = jax.jit(lambda w: constrain({"w": w}, wafer, "memoryx")["w"][...])(w)
    np.testing.assert_array_equal(out, w[...])
    tile = out.addressable_shards[0].data.shape
    assert tile == (2, 2) if size == 8 else tile[1] == 2  # XLA may split 6 rows over 4 PEs or not


def test_padding_is_cut_on_explicit_axes():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    make = lambda: {"w": nnx.Param(jnp.ones((5, 3)), axes=("in", "out"))}  # noqa: E731
    with jax.set_mesh(mesh), wafer:
        state = initialize(make, wafer)
        assert jax.jit(lambda s: logical(s)["w"][...].sum())(state) == 15
