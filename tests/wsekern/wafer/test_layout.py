"""Arrays padded to a grid, cropped and resized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.wafer import layout

SIZES = st.integers(0, 40)
SIDES = st.integers(1, 9)
SPECS = st.sampled_from(
    [P(), P("y"), P("y", "x"), P(None, "x"), P(("y", "x")), P("wafer", ("x", "y")), P("x", "wafer")]
)


@pytest.mark.parametrize(
    ("ndim", "trailing", "spec"),
    [
        (2, (), P("y", "x")),
        (3, (), P("wafer", "y", "x")),
        (4, (), P("wafer", None, "y", "x")),
        (1, ("x",), P("x")),
        (2, (None, "x"), P(None, "x")),
        (4, ("y",), P("wafer", None, None, "y")),
        (4, ("y", "x", None), P("wafer", "y", "x", None)),
    ],
)
def test_an_operand_lies_with_its_last_dimensions_on_the_grid(ndim, trailing, spec):
    assert layout.tiled(ndim, *trailing) == spec


def test_parts_count_the_pes_over_all_dimensions():
    wafer = wk.Wafer.virtual(wk.WSE2, 3, 5, wafers=2)
    specs = [P(), P("y"), P("y", "x"), P(None, "x"), P(("y", "x"), "wafer")]
    assert [layout.parts(spec, wafer) for spec in specs] == [1, 3, 15, 5, 30]


@given(st.tuples(SIZES, SIZES), SIDES, SIDES, SIDES, SPECS)
def test_the_padded_shape_is_the_least_that_divides(shape, height, width, wafers, spec):
    wafer = wk.Wafer.virtual(wk.WSE2, height, width, wafers)
    sides = {"y": height, "x": width, "wafer": wafers}
    padded = layout.padded_shape(shape, spec, wafer)
    for d, (was, now) in enumerate(zip(shape, padded, strict=True)):
        entry = (spec[d] if d < len(spec) else None) or ()
        parts = np.prod([sides[axis] for axis in ([entry] if isinstance(entry, str) else entry)])
        assert now % parts == 0 and was <= now < was + parts
    assert layout.padded_shape(padded, spec, wafer) == padded


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 2), SIDES, SIDES, SPECS)
def test_what_is_padded_is_cropped_to_what_it_was(shape, height, width, spec):
    wafer = wk.Wafer.virtual(wk.WSE2, height, width)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    padded = layout.pad(array, spec, wafer)
    assert padded.shape == layout.padded_shape(shape, spec, wafer)
    np.testing.assert_array_equal(layout.crop(padded, shape, spec, wafer), array)


@pytest.mark.parametrize("fill", [0, -np.inf, 3])
def test_the_far_ends_are_filled(full_wafer, fill):
    spec = P("y", "x")
    padded = jax.jit(lambda u: layout.pad(u, spec, full_wafer, fill))(np.ones((3, 5), np.float32))
    want = np.full(layout.padded_shape((3, 5), spec, full_wafer), fill, np.float32)
    want[:3, :5] = 1
    np.testing.assert_array_equal(padded, want)


def test_what_divides_is_handed_back_itself(full_wafer):
    array = jnp.ones((4, 8))
    assert layout.pad(array, P("y", "x"), full_wafer) is array
    assert layout.crop(array, (4, 8), P("y", "x"), full_wafer) is array


def test_padding_is_zero_in_gradient(full_wafer):
    spec = P("y", "x")

    def there_and_back(u):
        padded = layout.pad(u, spec, full_wafer, 2)
        return (layout.crop(padded**2, (3, 5), spec, full_wafer)).sum()

    def of_padded(padded):
        return (layout.crop(padded**2, (3, 5), spec, full_wafer)).sum()

    u = np.arange(15, dtype=np.float32).reshape(3, 5)
    np.testing.assert_array_equal(jax.jit(jax.grad(there_and_back))(u), 2 * u)
    padded = np.asarray(layout.pad(jnp.asarray(u), spec, full_wafer, 2))
    want = np.zeros_like(padded)
    want[:3, :5] = 2 * u
    np.testing.assert_array_equal(jax.jit(jax.grad(of_padded))(padded), want)


@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (4, 5), (3, 8), (4, 8)])
def test_explicit_axes_are_laid_out_when_padded_and_gathered_when_cropped(rows, cols):
    """A dimension that was not padded stays split: only what cannot be split is gathered."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Explicit,) * 2)
    wafer, spec = wk.Wafer.of(mesh, y="a", x="b"), P("y", "x")
    u = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    with jax.set_mesh(mesh):
        padded = jax.jit(lambda u: layout.pad(u, spec, wafer))(u)
        cropped = jax.jit(lambda p: layout.crop(p, u.shape, spec, wafer))(padded)
    assert padded.sharding == NamedSharding(mesh, P("a", "b"))
    assert cropped.sharding.spec == P("a" if rows == 4 else None, "b" if cols == 8 else None)
    np.testing.assert_array_equal(cropped, u)


def test_refuses_an_array_on_other_devices():
    stray = jax.device_put(np.ones((3, 5)), jax.devices()[9])
    with pytest.raises(
        ValueError, match=r"committed to 1 device\(s\) .* not the wafer's 8; move it"
    ):
        layout.pad(stray, P("y", "x"), wk.Wafer.devices(2, 4))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_resize_cuts_or_adds_zeros_at_the_far_end(axis, length):
    x = np.arange(1.0, 10).reshape(3, 3)
    got = np.asarray(layout.resize(jnp.asarray(x), axis, length))
    kept = min(length, 3)
    assert got.shape[axis] == length and got.size == 3 * length
    np.testing.assert_array_equal(got.take(range(kept), axis), x.take(range(kept), axis))
    assert not got.take(range(kept, length), axis).any()


# shape, its spec, the new shape, and the spec that the result then has on 2x3 devices; None: whole.
RESHAPES = [
    ((2, 4, 24), P(None, "y", "x"), (2, 4, 6, 4), P(None, "y", "x")),
    ((2, 4, 24), P(None, "y", "x"), (2, 4, 4, -1), P(None, "y")),  # 4 heads on 3 columns
    ((2, 1, 24), P(None, "y", "x"), (2, 1, 4, 6), None),  # XLA's partitioner dies of this one
    ((2, 5, 21), P(None, "y", "x"), (2, 5, 3, 7), P(None, None, "x")),
    ((2, 3, 4, 6), P(None, "y", "x"), (2, 3, 24), None),
    ((2, 2, 3, 8), P(None, "y", "x"), (2, 2, 24), P(None, "y", "x")),
    ((12, 2), P("y", "x"), (3, 4, 2), None),
    ((12, 2), P("y", "x"), (2, 6, 2), P("y")),
    ((4, 6), P("y", "x"), (24,), None),
    ((4, 6), P(None, "x"), (2, 2, 6), P(None, None, "x")),
    ((6, 4), P(("y", "x")), (6, 2, 2), P(("y", "x"))),
    ((1, 6, 1), P(None, "x"), (6,), P("x")),
    ((5,), P("x"), (1, 5, 1), None),
    ((0, 6), P(None, "x"), (0, 2, 3), None),
]


def wafer_of(kind, height=2, width=3):
    if kind == "spread":
        return wk.Wafer.virtual(wk.WSE2, 2 * height, 2 * width, devices=(height, width))
    if kind == "virtual":
        return wk.Wafer.virtual(wk.WSE2, height, width)
    names = ("a", "b")
    devices = np.array(jax.devices()[: height * width]).reshape(height, width)
    mesh = jax.sharding.Mesh(devices, names, axis_types=(getattr(AxisType, kind),) * 2)
    return wk.Wafer.of(mesh, y="a", x="b")


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "spread", "virtual"])
@pytest.mark.parametrize(("shape", "spec", "new", "after"), RESHAPES)
def test_a_reshape_equals_that_of_jax(shape, spec, new, after, kind):
    """And its gradient too, whether or not the sizes divide by the grid."""
    wafer = wafer_of(kind)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    def reshape(array):  # laid out as `spec` says, where it divides
        padded = layout.crop(layout.pad(array, spec, wafer), shape, spec, wafer)
        return layout.reshape(padded, new, spec, wafer)

    def run(array):
        out, back = jax.vjp(reshape, array)
        return out, back(2 * out)[0]

    with wafer:
        if kind == "Explicit":
            with jax.set_mesh(wafer.device_mesh):
                out, gradient = jax.jit(run)(array)
        else:
            out, gradient = jax.jit(run)(array)
    np.testing.assert_array_equal(out, array.reshape(new))
    # On virtual PEs spread over devices, the gradient of a gather is divided by their number.
    np.testing.assert_allclose(gradient, 2 * array, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spec", "new", "after"), [case for case in RESHAPES if 0 not in case[0]]
)
def test_nothing_moves_where_the_first_part_divides(shape, spec, new, after):
    """Else the dimensions that change are gathered, along their own axes alone."""
    wafer = wafer_of("Auto")
    laid_out = jax.ShapeDtypeStruct(shape, np.float32, sharding=wafer.sharding(P()))
    if layout.padded_shape(shape, spec, wafer) == shape:
        laid_out = jax.ShapeDtypeStruct(shape, np.float32, sharding=wafer.sharding(spec))
    program = jax.jit(lambda a: layout.reshape(a, new, spec, wafer)).lower(laid_out).compile()
    assert program.output_shardings.spec == wafer.sharding(after or P()).spec
    text = program.as_text()
    assert text is not None
    kept = after is not None and layout.parts(after, wafer) == layout.parts(spec, wafer)
    if kept:
        assert "all-gather" not in text
    assert not any(move in text for move in ("all-to-all", "collective-permute"))


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "spread", "virtual"])
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_repeat_equals_that_of_jax(heads, kind):
    wafer, spec = wafer_of(kind), P(None, "y", "x", None)
    array = np.arange(2 * 5 * heads * 2, dtype=np.float32).reshape(2, 5, heads, 2)

    def run(array):
        out, back = jax.vjp(lambda a: layout.repeat(a, 3, 2, spec, wafer), array)
        return out, back(jnp.ones(out.shape))[0]

    with jax.set_mesh(wafer.device_mesh) if kind == "Explicit" else wafer:
        out, gradient = jax.jit(run)(array)
    np.testing.assert_array_equal(out, np.repeat(array, 3, 2))
    np.testing.assert_array_equal(gradient, np.full_like(array, 3))


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "spread", "virtual"])
def test_a_look_up_by_tiles_has_the_right_gradient(kind):
    """Where XLA partitions the scatter of 7 rows over 3 rows of PEs, it adds their padding."""
    wafer = wafer_of(kind, 3, 2)
    rng = np.random.default_rng(0)
    table, rows = rng.normal(size=(4, 5)).astype(np.float32), jnp.asarray(rng.integers(0, 4, 7))
    weights = rng.normal(size=(7, 5)).astype(np.float32)

    def weighted(table):
        specs = (P(None, "x"), P("y"))
        taken = layout.tilewise(
            _take,
            table,
            rows,
            in_specs=specs,
            out_specs=P("y", "x"),
            wafer=wafer,
        )
        return (taken * weights).sum(), taken

    with jax.set_mesh(wafer.device_mesh) if kind == "Explicit" else wafer:
        (_, taken), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(table)
    np.testing.assert_array_equal(taken, table[rows])
    want = np.zeros_like(table)
    np.add.at(want, rows, weights)
    np.testing.assert_allclose(gradient, want, rtol=1e-5)


def _take(table, rows):
    return table[rows]


def test_an_estimate_charges_a_reshape_only_where_something_moves():
    def split(x):
        return layout.reshape(x, (4, 6, 4), P("y", "x"))

    x = jax.ShapeDtypeStruct((4, 24), np.float32)

    def moved(width):
        wafer = wk.Wafer.abstract(wk.WSE2, 2, width)
        double = wafer.map(lambda t: 2 * t, in_specs=P("y", "x"), out_specs=P("y", "x"))
        return wk.estimate(lambda x: split(double(x)), x, wafer=wafer).received

    assert moved(3) == 0 < moved(4)


@pytest.mark.refuses
def test_reshape_refuses_a_spec_of_more_dimensions():
    with pytest.raises(ValueError, match="has 3 dimensions, the array 2"):
        layout.reshape(jnp.zeros((4, 6)), (24,), P(None, "y", "x"), wafer_of("Auto"))


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("axis", "length", "message"),
    [
        (
            2,
            3,
            r"axis=2 is no dimension of an array of shape \(3, 3\); give an integer from -2 to 1",
        ),
        ("x", 3, "axis='x' is no dimension"),
        (0, -1, "length=-1 must be an integer of 0 or more"),
        (0, 2.0, "length=2.0 must be an integer of 0 or more"),
    ],
)
def test_resize_refuses(axis, length, message):
    with pytest.raises(ValueError, match=f"layout.resize: {message}"):
        layout.resize(jnp.zeros((3, 3)), axis, length)
