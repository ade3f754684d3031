"""Lay out a model's state on a wafer: weights, moments and everything beside them.

For a model of your own, name each weight's dimensions once, in its metadata:

    weight = nnx.Param(values, axes=("in", "out"))  # names from sharding.TABLE

Any pytree of such variables is a state, optax's moments included. Then

    state = sharding.initialize(make_state, wafer)  # no device ever holds a whole array
    layout = sharding.lay_out(state, wafer)  # a tree of shardings
    step = jax.jit(step, out_shardings=(layout, None), donate_argnums=0)  # state, loss
    model = nnx.merge(graph, sharding.logical(state["params"]))  # in `step`: without padding
    rich.print(sharding.placement_table(sharding.explain_state(state, wafer)))

JAX needs every dimension to divide by the PEs along it, so `initialize` pads a state with zeros and
remembers the shapes without padding; `logical` cuts the padding off. Gradients of padding are zero,
so optimizers leave it as it is. `docs/sharding.md` has a whole training loop.

This package imports `wsekern` alone. Names are loaded when first used.
"""

from typing import TYPE_CHECKING

from wsekern.public_names import lazy_names

if TYPE_CHECKING:
    from sharding.explain import ArrayPlacement as ArrayPlacement
    from sharding.explain import explain_state as explain_state
    from sharding.explain import placement_table as placement_table
    from sharding.rules import TABLE as TABLE
    from sharding.rules import Home as Home
    from sharding.rules import spec_of as spec_of
    from sharding.state import initialize as initialize
    from sharding.state import lay_out as lay_out
    from sharding.state import layout_of as layout_of
    from sharding.state import logical as logical
    from sharding.state import logical_shape as logical_shape
    from sharding.state import logical_shapes as logical_shapes
    from sharding.state import named_leaves as named_leaves
    from sharding.state import pad as pad

# Public name -> the module below `sharding` that defines it.
_HOMES = {
    "ArrayPlacement": "explain",
    "Home": "rules",
    "TABLE": "rules",
    "explain_state": "explain",
    "initialize": "state",
    "lay_out": "state",
    "layout_of": "state",
    "logical": "state",
    "logical_shape": "state",
    "logical_shapes": "state",
    "named_leaves": "state",
    "pad": "state",
    "placement_table": "explain",
    "spec_of": "rules",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
