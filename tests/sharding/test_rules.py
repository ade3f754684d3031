"""The table from names of dimensions to axes of the wafer."""

import pytest
from jax.sharding import PartitionSpec as P

from sharding.rules import spec_of


def test_a_product_is_named_by_position():
    assert spec_of(("layer", "in", "out")) == P(None, "y", "x")
    assert spec_of(("layer", "in", "out"), "memoryx") == P(None, ("y", "wafer"), "x")
    # Experts lie over the wafers already.
    assert spec_of(("expert", "in", "out"), "memoryx") == P("wafer", "y", "x")
    assert spec_of(("batch", "seq", "feature")) == P("wafer", "y", "x")


def test_a_tied_head_is_the_embedding_transposed_tile_by_tile():
    assert tuple(spec_of(("vocab", "in"))) == tuple(reversed(spec_of(("in", "vocab"))))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("in", "outt"), "'outt' is not one of"),
        (("out", "feature"), "two dimensions along one axis"),
    ],
)
def test_refuses(axes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(axes)
