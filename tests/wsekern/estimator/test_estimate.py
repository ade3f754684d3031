"""Estimates of programs whose cost can be counted by hand."""

import dataclasses
import functools
import html
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from estimating import array
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.estimator.cost import DEFAULT, Constants

FREE = Constants(
    vector_start=0.0,
    product_start=0.0,
    phase_start=0.0,
    paired_float32=1.0,
    accumulate_float32=1.0,
)
GRID = P("y", "x")


def abstract(height, width=None, machine=wk.WSE2):
    return wk.Wafer.abstract(machine, height, width or height)


def on_grid(wafer, kernel, specs=GRID):
    return wafer.map(kernel, in_specs=specs, out_specs=GRID)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_cannon_equals_a_hand_count(p):
    """Either operand is skewed and shifted p - 1 times, and held twice beside the inputs."""
    tile = 6 * 6
    a = array(6 * p, 6 * p)
    e = wk.estimate(functools.partial(wk.matmul, algorithm="cannon"), a, a, wafer=abstract(p))
    assert e.received == 2 * p * tile and e.moves == 2 * p
    assert e.flops == 2 * (6 * p) ** 3
    assert e.sram_per_pe == 4 * tile * (2 + 4 + 1)  # inputs, two held of each, result


@pytest.mark.parametrize("p", [2, 4, 8])
def test_summa_equals_a_hand_count(p):
    """Each of p products floods a panel of each operand; both are held, and the source of one."""
    tile = 6 * 6
    a = array(6 * p, 6 * p)
    e = wk.estimate(functools.partial(wk.matmul, algorithm="summa"), a, a, wafer=abstract(p))
    assert e.received == 2 * p * tile and e.moves == 2 * p
    assert e.flops == 2 * (6 * p) ** 3
    assert e.sram_per_pe == 4 * tile * (2 + 3 + 1)


def test_ring_attention_equals_a_hand_count():
    """Keys and values move p - 1 times round the ring."""
    p, T, heads, size = 4, 32, 2, 8
    q = array(1, T, heads, size)
    run = functools.partial(wk.attention, algorithm="ring")
    e = wk.estimate(run, q, q, q, wafer=abstract(p, 1))
    tile = T // p * heads * size
    assert e.received == (p - 1) * 2 * tile and e.moves == p - 1
    assert e.words["S"] == e.received
    whole = 2 * 2 * T * T * heads * size  # scores, and values under weights
    assert whole <= e.flops <= 1.6 * whole


@pytest.mark.parametrize(("p", "depth"), [(2, 1), (4, 2)])
def test_a_halo_equals_a_hand_count(p, depth):
    """Rows are exchanged first, then columns with the rows' halo in them."""
    h, w = 8, 6
    run = functools.partial(wk.halo_exchange, width=depth, boundary="periodic")
    e = wk.estimate(run, array(h * p, w * p), wafer=abstract(p))
    assert e.received == 2 * depth * w + 2 * depth * (h + 2 * depth)
    assert e.moves == 4


def test_a_tile_product_takes_one_instruction_for_each_element_of_its_smaller_factor():
    """3 x 5 times 5 x 40 takes 15 instructions of 40 elements, in 3 loops; so does 40 x 5 x 3."""
    each = DEFAULT.accumulate_float32 / 4  # 4 elements of 16 bits a cycle meet in the banks
    rows = 15 * (DEFAULT.product_start + 40 * each) + 3 * DEFAULT.vector_start
    for shapes in ([(3, 5), (5, 40)], [(40, 5), (5, 3)]):
        a, b = (array(2 * s[0], 2 * s[1], dtype=jnp.float16) for s in shapes)
        kernel = lambda a, b: (a @ b).astype(a.dtype)  # noqa: E731
        e = wk.estimate(on_grid(abstract(2), kernel), a, b, wafer=abstract(2))
        assert e.cycles == pytest.approx(rows)


def test_a_product_and_a_sum_are_one_instruction():
    a = array(64, 64)
    kernel = lambda x, y: x * 3.0 + y  # noqa: E731
    e = wk.estimate(on_grid(abstract(2), kernel), a, a, wafer=abstract(2))
    n = 32 * 32
    assert e.cycles == pytest.approx(DEFAULT.vector_start + n * DEFAULT.accumulate_float32)
    assert e.flops == 2 * 64 * 64


def test_a_move_overlaps_what_does_not_wait_for_it():
    def both(x, y):
        return fabric.shift(x, "x") + 1.0, y @ y

    def one_after_the_other(x, y):
        moved = fabric.shift(x, "x")
        return moved + 1.0, y @ (y + moved)

    wafer, a = abstract(4), array(160, 160)
    cycles = [
        wk.estimate(
            wafer.map(k, in_specs=GRID, out_specs=GRID), a, a, wafer=wafer, constants=FREE
        ).cycles
        for k in (both, one_after_the_other)
    ]
    words, product = 40 * 40, 40**3
    # A cyclic shift comes back along the line: as many words, 3 hops, two ramps and a step.
    assert cycles[0] == pytest.approx(product + words)
    assert cycles[1] == pytest.approx(words + 3 + 5 + words + product, rel=0.05)


def test_a_scan_costs_its_trips():
    wafer = abstract(8)

    def cycles(trips):
        def kernel(x):
            def step(x, _):
                return fabric.shift(x, "x") * 2.0, None

            return lax.scan(step, x, length=trips)[0]

        return wk.estimate(on_grid(wafer, kernel), array(32, 32), wafer=wafer).cycles

    a, b, c = cycles(50), cycles(100), cycles(1000)
    assert b - a == pytest.approx((c - a) / 19, rel=1e-6)


def test_a_reduction_that_repeats_the_last_one_starts_no_phase():
    wafer = abstract(16)

    def phases(*sums):
        def kernel(x):
            for along, op in sums:
                x = fabric.all_reduce(x, along, op, algorithm="k_tree")
            return x

        only_phases = dataclasses.replace(FREE, phase_start=1e6)
        cycles = wk.estimate(
            on_grid(wafer, kernel), array(64, 64), wafer=wafer, constants=only_phases
        ).cycles
        return round(cycles / 1e6)

    assert phases(("y", "sum")) == phases(("y", "sum"), ("y", "sum")) == 3
    assert phases(("y", "sum"), ("x", "sum")) == phases(("y", "sum"), ("y", "max")) == 6


def test_a_solver_costs_its_iterations():
    """Only the solution of a linear solve runs, and each iteration moves the same."""

    def update(u, k):
        around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
        return (4 + k) * u[1:-1, 1:-1] - around

    def solve(b, k):
        operator = functools.partial(wk.stencil, update=update, radius=1, coefficients=k)
        return wk.cg(operator, b).x

    wafer = abstract(8)
    moves, cycles = zip(
        *(
            (e.moves, e.cycles)
            for trips in (10, 20, 200)
            for e in [wk.estimate(solve, array(64, 64), array(), wafer=wafer, trips=trips)]
        ),
        strict=True,
    )
    assert moves[1] - moves[0] == (moves[2] - moves[1]) / 18 >= 10 * (4 + 2)
    assert cycles[1] - cycles[0] == pytest.approx((cycles[2] - cycles[1]) / 18, rel=1e-2)


def test_what_only_the_place_of_a_pe_decides_costs_nothing():
    def kernel(x):
        place = fabric.axis_index("x") * 2 + 1
        return jnp.where(place > 3, x, -x) if False else jnp.where(place > 3, x, jnp.zeros_like(x))

    wafer = abstract(4)
    e = wk.estimate(on_grid(wafer, kernel), array(64, 64), wafer=wafer)
    assert e.cycles == 0 and e.bound == "latency"


def test_a_change_of_layout_is_charged_and_named():
    wafer = abstract(8)
    first = wafer.map(lambda x: x * 2.0, in_specs=GRID, out_specs=GRID)
    second = wafer.map(lambda x: x + 1.0, in_specs=P("x", "y"), out_specs=P("x", "y"))
    differs = wk.estimate(lambda x: second(first(x)), array(64, 64), wafer=wafer)
    same = wk.estimate(lambda x: first(first(x)), array(64, 64), wafer=wafer)
    assert any(name == "relayout" for name, _, _ in differs.by_operation)
    assert differs.moves == 1 and same.moves == 0


def test_unknown_operations_are_named_and_counted():
    wafer = abstract(2)
    e = wk.estimate(on_grid(wafer, lambda x: jnp.sort(x)), array(64, 64), wafer=wafer)
    assert list(e.unknown) == ["sort"] and e.cycles > 0
    assert "spread evenly" in str(e) and "sort" in str(e)


def test_a_gradient_costs_about_twice_the_product():
    wafer, a = abstract(8), array(256, 256)
    product = functools.partial(wk.matmul, algorithm="mesh_gemm")
    forward = wk.estimate(product, a, a, wafer=wafer)
    both = wk.estimate(jax.grad(lambda a, b: product(a, b).sum(), (0, 1)), a, a, wafer=wafer)
    assert both.flops == pytest.approx(2 * forward.flops, rel=0.02)
    assert forward.bound == "compute"


def test_machines_differ_and_the_clock_is_an_input():
    a = array(1024, 1024, dtype=jnp.float16)
    run = functools.partial(wk.matmul, algorithm="mesh_gemm")
    two, three = (wk.estimate(run, a, a, wafer=abstract(16, machine=m)) for m in (wk.WSE2, wk.WSE3))
    assert three.cycles < two.cycles and two.energy != three.energy
    fast = wk.estimate(run, a, a, wafer=abstract(16), clock_hz=1.1e9)
    assert fast.cycles == two.cycles and fast.seconds < two.seconds
    assert two.accelerators["H100 SXM"] > two.accelerators["H200 SXM"] * 0.5


def test_a_gpu_pays_for_each_launch_and_rereads_what_its_cache_cannot_hold():
    small, large = array(256, 256), array(8192, 8192)  # 0.5 and 537 MB, read and written
    double = lambda u: u + u  # noqa: E731
    for u, passes in ((small, 1), (large, 1000)):
        one, many = (
            wk.estimate(double, u, wafer=abstract(16), launches=n).accelerators for n in (1, 1000)
        )
        for chip in (wk.A100, wk.H100):
            memory = 2 * 4 * u.size / chip.memory_bytes_per_second
            assert one[chip.name] == pytest.approx(memory + 0.5e-6)
            assert many[chip.name] == pytest.approx(passes * memory + 1000 * 0.5e-6)
        assert many["TPU v5e"] == pytest.approx(one["TPU v5e"] * passes)
    assert "at its roofline, 7 launches" in str(
        wk.estimate(double, small, wafer=abstract(16), launches=7)
    )
    with pytest.raises(ValueError, match="launches=0 must be 1 or more"):
        wk.estimate(double, small, wafer=abstract(16), launches=0)


def test_a_program_that_does_not_fit_says_by_how_much():
    a = array(1024, 1024)
    e = wk.estimate(functools.partial(wk.matmul, algorithm="mesh_gemm"), a, a, wafer=abstract(2))
    assert not e.fits
    assert f"{e.sram_per_pe - e.sram_free:,.0f} too many" in str(e)


def test_refuses_a_loop_of_unknown_length_and_a_wafer_without_cycles():
    def until_done(x):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x + 1, x)

    with pytest.raises(ValueError, match=r"a while loop at test_estimate.py:\d+ runs as often"):
        wk.estimate(until_done, array(8, 8), wafer=abstract(2))
    assert wk.estimate(until_done, array(8, 8), wafer=abstract(2), trips=5).cycles > 0
    with pytest.raises(ValueError, match="there is no wafer"):
        wk.estimate(until_done, array(8, 8))
    with pytest.raises(ValueError, match="give wafer=wk.Wafer.abstract"):
        wk.estimate(jnp.sin, array(8, 8), wafer=wk.Wafer.devices(2, 2))


def test_refuses_numbers_out_of_range():
    cases: dict[str, tuple] = {
        "clock_hz": (0, -1.0, float("nan"), float("inf"), "fast", True),
        "trips": (-1, 2.5, float("nan"), 10**20, "3"),
        "launches": (0, -1, 1.5, float("inf"), 10**20, None),
        "density": (-0.1, float("nan"), "half", None),
    }
    for name, values in cases.items():
        for value in values:
            option: dict[str, Any] = {name: value}
            with pytest.raises(ValueError, match=f"estimate: {name}={value!r} must be"):
                wk.estimate(jnp.sin, **option)


def test_only_products_skip_zeros():
    a = jax.ShapeDtypeStruct((512, 512), jnp.float16)
    wafer = wk.Wafer.abstract(wk.WSE3, 8, 8)
    full, half = (wk.estimate(wk.matmul, a, a, wafer=wafer, density=d) for d in (1.0, 0.5))
    assert half.flops == full.flops / 2 and half.words == full.words
    assert full.cycles / 2 < half.cycles < 0.6 * full.cycles
    with pytest.raises(ValueError, match="density=1.5 must be from 0 to 1"):
        wk.estimate(wk.matmul, a, a, wafer=wafer, density=1.5)


def test_recomputation_for_a_gradient_is_priced():
    """Differentiation leaves a flood without operands behind in the trace."""
    wafer = wk.Wafer.abstract(wk.WSE3, 4, 8)
    a = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    @jax.checkpoint
    def layer(a, b):
        return jnp.tanh(wk.matmul(jnp.tanh(a), b, algorithm="summa"))

    product = 2 * 64**3
    assert product < wk.estimate(layer, a, a, wafer=wafer).flops < 1.5 * product
    e = wk.estimate(jax.grad(lambda a, b: layer(a, b).sum(), (0, 1)), a, a, wafer=wafer)
    # The sum itself has no reader. Left are the product, its recomputation, and two gradients.
    assert 3 * product < e.flops < 3.5 * product


def test_a_notebook_shows_an_estimate_as_the_table_that_is_printed():
    kernel = lambda x: jnp.sort(x) * 2.0  # noqa: E731
    e = wk.estimate(on_grid(abstract(2), kernel), array(64, 64), wafer=abstract(2))
    assert isinstance(e, wk.Estimate)
    shown = e._repr_html_()
    assert shown.startswith("<table>") and shown.count("<tr>") == len(str(e).splitlines()) - 2
    for line in str(e).split("\n\n")[0].splitlines():
        name, value = line[:16].strip(), line[17:]
        assert f">{html.escape(name)}</th>" in shown and f">{html.escape(value)}</td>" in shown
    name, line, cycles = e.by_operation[0]
    assert f">{cycles:,.0f} cycles</th>" in shown and f">{name}  {line}</td>" in shown


def _doubled(x):
    return wk.matmul(x, x) + jnp.pad(x @ x, 1)[1:-1, 1:-1]


def test_time_is_charged_to_the_users_lines():
    """To the innermost one, also where JAX has the trace of a library's function from before."""
    wafer, a = abstract(4), array(64, 64)
    first = _doubled.__code__.co_firstlineno + 1

    def again(x):
        return wk.matmul(x, x) @ x

    for function, line in ((_doubled, first), (again, again.__code__.co_firstlineno + 1)):
        e = wk.estimate(function, a, wafer=wafer)
        assert {where for _, where, _ in e.by_operation} == {f"test_estimate.py:{line}"}
        lanes = {event.line for event in e.events}
        assert lanes == {f"test_estimate.py:{line}"}
    e = wk.estimate(wk.matmul, a, a, wafer=wafer)
    assert all(where.startswith("test_estimate.py:") for _, where, _ in e.by_operation)


def test_a_stencils_update_is_charged_to_its_own_lines():
    def update(u):
        return u[1:-1] + u[2:]

    step = functools.partial(wk.stencil, update=update, radius=(1, 0), steps=3)
    e = wk.estimate(lambda u: step(u), array(64, 64), wafer=abstract(4))
    added = [where for name, where, _ in e.by_operation if name == "add"]
    assert added == [f"test_estimate.py:{update.__code__.co_firstlineno + 1}"]


def test_what_bounds_a_program_is_said_once():
    """Where the engine does nothing but wait for its memory's ports, both are shown as busy."""
    wafer, a = abstract(8), array(800, 800)
    picks = wk.estimate(lambda c, a, b: jnp.where(c > 0, a, b), a, a, a, wafer=wafer)
    assert picks.memory_share <= picks.busy["compute"] / picks.cycles
    for e in (picks, wk.estimate(lambda a, b: a @ b, a, a, wafer=wafer)):
        shown = next(line for line in str(e).splitlines() if line.startswith("bound by"))
        assert f"bound by         {e.bound} (busy: compute " in shown and ", memory " in shown
        assert e.bound != "memory" or e.memory_share > 0.9 * e.busy["compute"] / e.cycles
        assert ("; compute waits for memory" in shown) == (e.bound == "memory")


@pytest.mark.parametrize(
    "function",
    [
        lambda c: jnp.where(c > 0, c * 2, c),
        lambda c: jnp.where(c > 0, c.astype(jnp.float16), 0),
        lambda c: c @ c,
        lambda c: jnp.sort(c),
        lambda c: c.sum(),
        lambda c: c[:20].sum(),
        lambda c: jnp.roll(c, 1, 0) + c,
        lambda c: jnp.exp(c) + c.T,
        lambda c: jnp.tanh(c) + c.T,
        lambda c: lax.associative_scan(jnp.add, c),
        lambda c: jax.nn.softmax(c, 0),
    ],
)
@pytest.mark.parametrize("side", [8, 64, 320])
def test_what_bounds_a_program_is_what_is_shown_as_busiest(function, side):
    e = wk.estimate(function, array(side, side), wafer=abstract(8))
    shown = next(line for line in str(e).splitlines() if line.startswith("bound by"))
    percent = {lane: int(n) for lane, n in re.findall(r"(\w+) (\d+)%", shown)}
    links = max((n for lane, n in percent.items() if lane in "NESW"), default=0)
    busiest = max(percent["compute"], links)
    if e.bound == "latency":
        assert busiest < 50
    elif e.bound == "fabric":
        assert links >= max(50, percent["compute"])
    else:
        assert percent["compute"] >= max(50, links)
        assert e.bound == "compute" or percent["memory"] >= percent["compute"] - 6


def _nested(x):
    """Loops, branches and calls within one another."""

    def inner(i, c):
        return lax.cond(c[0, 0] > i, lambda c: jnp.tanh(c @ x), lambda c: jnp.roll(c, 1, 0), c)

    def outer(c, _):
        return lax.fori_loop(0, 4, inner, c), c.sum()

    return lax.scan(jax.checkpoint(outer), x, length=30)


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, d: (d * jnp.cos(x),))


def _kernel_in_a_loop(x):
    wafer = abstract(8)

    def shifted(t):
        return lax.scan(lambda c, _: (fabric.shift(c, "x") @ t, None), t, length=9)[0]

    return lax.scan(lambda c, _: (on_grid(wafer, shifted)(c), None), x, length=7)[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: lax.associative_scan(jnp.add, x),
        lambda x: lax.map(lambda row: row * row.sum(), x),
        lambda x: _nested(x),
        jax.grad(lambda x: _nested(x)[0].sum()),
        lambda x: lax.while_loop(lambda c: c.sum() < 3, lambda c: lax.map(jnp.cumsum, c @ x), x),
        jax.vmap(lambda row: jax.nn.softmax(row) @ row),
        jax.grad(lambda x: _sine(x @ x).sum()),
        jax.value_and_grad(jax.checkpoint(lambda x: jnp.tanh(x @ x).sum())),
        _kernel_in_a_loop,
        jax.grad(lambda x: _kernel_in_a_loop(x).sum()),
        lambda x: wk.attention(*[x[None, :, None]] * 3, causal=True),
        lambda x: jnp.sort(x.ravel())[::2] + jnp.fft.fft(x).real.ravel()[::2],
        lambda x: x[x[0].astype(int)].at[x[1].astype(int)].add(1.0),
    ],
    ids=(
        "associative_scan map nested nested_grad while vmap custom_vjp remat kernel kernel_grad "
        "attention sort indices"
    ).split(),
)
def test_the_operations_of_a_program_add_up_to_its_cycles(function):
    e = wk.estimate(function, array(64, 64), wafer=abstract(8), trips=25)
    rows = [cycles for _, _, cycles in e.by_operation]
    assert sum(rows) == pytest.approx(e.cycles) and min(rows) >= 0
    assert max(e.busy.values()) <= e.cycles * (1 + 1e-9) and e.memory_share <= 1
    assert e.fraction_of_peak <= 1
    lines = {line for _, line, cycles in e.by_operation if cycles}
    assert all(line.startswith("test_estimate.py:") for line in lines)
    for line in [*e.assumed.values(), *e.unknown.values()]:
        assert line.startswith("test_estimate.py:")
    assert not any("_" in name and name.endswith(("invariant", "index")) for name in e.unknown)


def test_names_of_jax_itself_are_not_shown():
    """A sum over one PE, random numbers and a choice of platforms are no unknown operations."""
    e = wk.estimate(wk.gemv, array(1, 64), array(64, 64), wafer=abstract(1, 8))
    assert not e.unknown
    draw = lambda x: x + jax.random.normal(jax.random.key(0), x.shape)  # noqa: E731
    e = wk.estimate(draw, array(64, 64), wafer=abstract(8))
    assert not e.unknown
    assert not wk.estimate(jnp.diagonal, array(64, 64), wafer=abstract(8)).unknown


def test_random_numbers_are_drawn_when_the_program_runs():
    """Also with a fixed key: 20 rounds of five operations for two words, then the bell."""
    draw = lambda: jax.random.normal(jax.random.key(0), (64, 64))  # noqa: E731
    assert wk.estimate(draw, wafer=abstract(8)).cycles > 64 * 64 / 64 * 100 / 2


def test_what_is_printed_and_called_back_is_priced_around_it():
    def printed(x):
        jax.debug.print("{}", x[0, 0])
        return jax.pure_callback(lambda x: x, x, x) * 2.0

    e = wk.estimate(printed, array(64, 64), wafer=abstract(8))
    assert e.cycles > 64 and "jax.pure_callback" in e.unknown

    def within(x):
        jax.debug.print("{}", x)
        return x * 2.0

    assert wk.estimate(on_grid(abstract(8), within), array(64, 64), wafer=abstract(8)).cycles > 64


def test_no_trip_starts_before_its_condition_is_known():
    """A sum over the wafer decides; each trip waits for it."""
    trip = lambda c: c + 1.0  # noqa: E731
    known = wk.estimate(lambda x: lax.while_loop(lambda c: c.sum() < 3, trip, x), array(64, 64),
                        wafer=abstract(8), trips=10)  # fmt: skip
    once = wk.estimate(jnp.sum, array(64, 64), wafer=abstract(8))
    assert known.cycles > once.cycles + 9 * 2 * (7 + 7)
