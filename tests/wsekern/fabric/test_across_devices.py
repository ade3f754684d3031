"""Moves between virtual PEs that are spread over devices: results, gradients, bytes sent."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.fabric import across_devices
from wsekern.wafer import context

TILED = P("y", "x")
EVERY = ("wafer", "y", "x")
TILE = 3  # rows and columns
# Shape and devices: blocks of several PEs, and several devices, along every axis.
SHAPES = {"4x6": ((4, 6), (2, 3)), "6x4": ((6, 4), (3, 1)), "4of2x4": ((2, 4, 4), (2, 2, 2))}


def spread(name):
    shape, devices = SHAPES[name]
    return wk.Wafer.virtual(wk.WSE2, *shape, devices=devices)


def alone(wafer):
    return wk.Wafer.virtual(wk.WSE2, wafer.height, wafer.width, wafer.wafers)


def operand(wafer):
    shape = (wafer.wafers, TILE * wafer.height, TILE * wafer.width)
    return np.random.default_rng(0).integers(-9, 9, shape).astype(np.float32)


def check_same_on_one_device(wafer, kernel):
    """`kernel` on the wafer and on one device: results, gradient and tangent are the same."""

    def everything(wafer):
        run = wafer.map(kernel, in_specs=P(*EVERY), out_specs=P(*EVERY))

        @jax.jit
        def call(u):
            out, pull = jax.vjp(run, u)
            weights = [(jnp.arange(o.size, dtype=o.dtype) % 7 - 3).reshape(o.shape) for o in out]
            return out, pull(weights), jax.jvp(lambda u: run(u * u), (u,), (u,))

        return call(operand(wafer))

    got, want = everything(wafer), everything(alone(wafer))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", SHAPES)
def test_moves_are_those_of_one_device(name):
    """Along every axis, by less and by more than a block, in both orders of a ring."""
    wafer = spread(name)

    def kernel(u):
        shifts = [fabric.shift(u, a, by) for a in EVERY for by in (1, -1, 2, -3)]
        opened = [fabric.shift(u, a, by, periodic=False, fill=5) for a in EVERY for by in (1, -3)]
        folded = [fabric.shift(u, a, by, ring="folded") for a in ("y", "x") for by in (1, -2)]
        last = fabric.axis_size("x") - 1
        routed = [fabric.route(u, "x", [(0, last), (last, 1), (1, 0)], fill=-1)]
        routed.append(fabric.route(u, "y", [(i, 1 - i) for i in range(2)]))
        return [*shifts, *opened, *folded, *routed, fabric.skew(u, "x", "y", times=-1, plus=1)]

    check_same_on_one_device(wafer, kernel)


@pytest.mark.parametrize("name", ["4x6", "4of2x4"])
def test_collectives_are_those_of_one_device(name):
    wafer = spread(name)

    def kernel(u):
        moved = [fabric.all_gather(u, along, 1) for along in ("wafer", "x", ("y", "x"), EVERY)]
        moved += [fabric.all_reduce(u, EVERY), fabric.all_reduce(u, "y", "mean")]
        moved += [fabric.broadcast(u, ("y", "x"), 5), fabric.reduce(u, EVERY, 3)]
        for axis in ("y", "x"):
            wide = jnp.tile(u, (1, fabric.axis_size(axis), 1))
            moved.append(fabric.reduce_scatter(wide, axis, 1))
            moved.append(fabric.all_to_all(wide, axis, 1, 2))
        return moved

    check_same_on_one_device(wafer, kernel)


@pytest.mark.parametrize("algorithm", ["chain", "tree", "k_tree", "optimal", "ring", "snake"])
def test_a_reduction_by_any_algorithm_crosses_devices(algorithm):
    def kernel(u):
        return [fabric.all_reduce(u, ("y", "x"), algorithm=algorithm)]

    check_same_on_one_device(spread("4x6"), kernel)


def test_a_dimension_that_lies_along_two_axes_is_put_together_again():
    wafer = spread("4of2x4")
    u = np.arange(2 * 4 * 4 * 2, dtype=np.float32).reshape(8, 8)
    along = P(("wafer", "y"), "x")
    run: Any = functools.partial(fabric.shift, along="y")
    got = [w.map(run, in_specs=along, out_specs=along)(u) for w in (wafer, alone(wafer))]
    np.testing.assert_array_equal(*got)
    line = P(("x", "wafer", "y"))
    places = wafer.map(lambda u: u * 0 + fabric.axis_index(("x", "wafer", "y")), in_specs=line,
                       out_specs=line)(np.zeros(32))  # fmt: skip
    np.testing.assert_array_equal(places, np.arange(32))


def test_what_is_the_same_on_every_pe_leaves_once_with_its_gradient():
    wafer = spread("4of2x4")

    def loss(u, w):
        run = wafer.map(
            lambda u, w: (fabric.all_reduce((u * w[None]).sum((1, 2)), EVERY), w * 2),
            in_specs=(P(*EVERY), P()),
            out_specs=(P(), P()),
        )
        total, double = run(u, w)
        return (total**2).sum() + (double**3).sum()

    def plain(u, w):
        tiles = u.reshape(wafer.wafers, wafer.height, TILE, wafer.width, TILE)
        total = jnp.einsum("nhawb,ab->", tiles, w)
        return total**2 + ((2 * w) ** 3).sum()

    w = np.arange(9.0, dtype=np.float32).reshape(TILE, TILE)
    got, want = (jax.jit(jax.grad(f, (0, 1)))(operand(wafer), w) for f in (loss, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


@pytest.mark.parametrize("by", [1, -1, 2, 5, -6])
def test_a_kernel_can_differentiate_shifts_itself(by):
    wafer = spread("4x6")

    def kernel(u, of_result):
        def shifted(u):
            return fabric.shift(u * u, "x", by), fabric.shift(u, "y", by, periodic=False, fill=1)

        with context.differentiating():
            out, pull = jax.vjp(shifted, u)
        return out, pull((of_result, of_result))[0]

    u = operand(wafer)[0]
    got, want = (
        w.map(kernel, in_specs=TILED, out_specs=TILED)(u, np.cos(u)) for w in (wafer, alone(wafer))
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_kernel_cannot_differentiate_other_moves_itself():
    def kernel(u):
        with context.differentiating():
            return fabric.shift(u, "x", ring="folded")

    with pytest.raises(NotImplementedError, match="a move along 'x' that is no shift"):
        spread("4x6").map(kernel, in_specs=TILED, out_specs=TILED)(operand(spread("4x6"))[0])


def bytes_sent(program, *operands):
    """Bytes of each collective-permute of the compiled program, those in loops too."""
    text = program.lower(*operands).compile().as_text()
    shapes = re.findall(
        r"= (?:\()?f32\[([\d,]*)\][^ ]* (?:f32\S* |u32\S* )*collective-permute", text
    )
    assert len(shapes) == len(re.findall(r" collective-permute(?:-start)?\(", text))
    return sorted(4 * int(np.prod([int(n) for n in s.split(",")])) for s in shapes)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_shift_sends_edges_and_not_blocks(gradient):
    """A device has 8 x 12 PEs of 3 x 5 words: the edge along y is 12 of them, along x it is 8."""
    wafer = wk.Wafer.virtual(wk.WSE2, 16, 24, devices=(2, 2))
    u = np.ones((16 * 3, 24 * 5), np.float32)
    tile = 4 * 3 * 5

    def kernel(u):
        return fabric.shift(u, "y", 1), fabric.shift(u, "x", -2)

    run: Any = wafer.map(kernel, in_specs=TILED, out_specs=TILED)
    if gradient:
        value = run
        run = jax.grad(lambda u: sum((v**2).sum() for v in value(u)))
    assert bytes_sent(jax.jit(run), u) == sorted([12 * tile, 2 * 8 * tile] * (2 if gradient else 1))


def test_a_stencil_sends_the_edges_of_edges():
    """One cell of each PE at the edge: 24 x 5 words, of a block of 8 x 24 x 3 x 5."""
    wafer = wk.Wafer.virtual(wk.WSE2, 16, 24, devices=(2, 1))
    u = np.ones((16 * 3, 24 * 5), np.float32)

    def heat(u):
        return u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]

    def steps(u):
        return wk.stencil(u, heat, radius=1, corners=False, wafer=wafer, boundary="periodic")

    assert set(bytes_sent(jax.jit(steps), u)) == {4 * 24 * 5}


def test_a_reduction_sends_one_tile_for_each_block():
    wafer = wk.Wafer.virtual(wk.WSE2, 16, 24, devices=(2, 1))
    run = wafer.map(
        lambda u: fabric.all_reduce(u, ("y", "x"), algorithm="xla"), in_specs=TILED, out_specs=P()
    )
    text = jax.jit(run).lower(np.ones((16 * 3, 24 * 5), np.float32)).compile().as_text() or ""
    assert re.findall(r"f32\[([\d,]+)\]\S* all-reduce\(", text) == ["3,5"]


@pytest.mark.parametrize(("devices", "block"), [(2, 3), (3, 2), (4, 1), (1, 5)])
def test_a_plan_says_who_hears_whom(devices, block):
    """Of shifts by any distance, cyclic and open, from the definition."""
    size = devices * block
    for by, cyclic in itertools.product(range(-size, size + 1), (True, False)):
        pairs = [(i, (i + by) % size) for i in range(size) if cyclic or 0 <= i + by < size]
        plan = across_devices.plan_move(devices, block, tuple(pairs))
        assert plan.stretches is not None and len(plan.stretches) <= 3
        heard = np.full((devices, block), -1)
        for begin, length, of, ahead, hear in plan.stretches:
            for d, i in itertools.product(range(devices), range(length)):
                if hear[d, i]:
                    heard[d, begin + i] = (d - ahead) % devices * block + of + i
        want = np.full(size, -1)
        for a, b in pairs:
            want[b] = a
        np.testing.assert_array_equal(heard.ravel(), want)


def test_a_loop_of_moves_may_be_scanned_and_kept():
    def kernel(u):
        step = jax.checkpoint(lambda u, _: (fabric.shift(jnp.sin(u), "x"), None))
        return [lax.scan(step, u, length=3)[0]]

    check_same_on_one_device(spread("4x6"), kernel)
