"""A linear system solved on every PE of a virtual wafer, against the same solver on one array.

The problem is that of K. Rocki et al., "Fast Stencil-Code Computation on a Wafer-Scale Processor",
SC 2020: a 7-point stencil on 600 x 595 columns, one on each PE, solved by BiCGStab. The matrix
differs from cell to cell and is not symmetric. It is scaled to a diagonal of ones, so six diagonals
are stored.

Each solver runs once, to convergence: a solve takes so long that other load evens out. The ratio is
to `wk.bicgstab` on one array. Command: `python -m benchmarks bicgstab`
"""

import dataclasses
import functools
import pathlib
import resource
import time

import tyro

from benchmarks import harness

# The paper: 0.86 PFLOP/s on 600 x 595 x 1536 cells, 44 operations a cell in an iteration.
_PUBLISHED_SECONDS = 600 * 595 * 1536 * 44 / 0.86e15
_PUBLISHED_DEPTH = 1536
_DIAGONALS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class BicgstabOptions:
    """Solve by one kernel on virtual PEs and by `wk.bicgstab` on one array; compare both."""

    grid: tuple[int, int] = (600, 595)
    """PEs along y and along x."""
    depth: int = 128
    """Cells in a PE's column; the paper has 1536, in float16."""
    tolerance: float = 1e-6
    """Residual to stop at, as a share of the right side's norm."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints the times, the largest difference, and the estimate of an iteration on WSE-1."""
    options = tyro.cli(BicgstabOptions, prog="python -m benchmarks bicgstab", args=argv)
    harness.start(1)
    harness.show_environment()
    import numpy as np

    import wsekern as wk

    wafer = wk.Wafer.virtual(wk.WSE1, *options.grid)
    matrix, b = problem((*options.grid, options.depth))
    runs = {
        "virtual wafer": functools.partial(solve, wafer=wafer, tolerance=options.tolerance),
        "one array": functools.partial(plain, tolerance=options.tolerance),
    }
    out = harness.console().print
    out(f"memory of the program: {wk.memory(runs['virtual wafer'], matrix, b)}", highlight=False)
    results, answers = [], {}
    for name, run in runs.items():
        result, answers[name] = _time_once(name, run, matrix, b)
        results.append(result)
    ratios = [r.seconds / results[-1].seconds for r in results]
    results = [
        dataclasses.replace(r, ratio=q, low=q, high=q) for r, q in zip(results, ratios, strict=True)
    ]
    shape = "x".join(map(str, b.shape))
    harness.show(f"BiCGStab, 7-point stencil on {shape} cells, float32", results)
    x, want = (np.asarray(answer) for answer in answers.values())
    apart = np.abs(x - want).max() / np.abs(want).max()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out(f"largest difference {apart:.1e} of the largest value; {peak / 1e9:.2f} GB at most")
    out(published_time())
    if options.json:
        harness.dump(options.json, {"bicgstab": results}, {"apart": float(apart), "peak": peak})


def problem(shape: tuple[int, int, int], dtype: str = "float32", seed: int = 0):
    """Six diagonals (north, south, west, east, below, above) and a right side, each of `shape`."""
    import jax

    @jax.jit
    def draw(key):
        *keys, last = jax.random.split(key, _DIAGONALS + 1)
        pull = [jax.random.uniform(k, shape, minval=0.2, maxval=1.8) for k in keys]
        whole = sum(pull) + 0.2  # the diagonal: a little more than the others' sum
        diagonals = tuple((-p / whole).astype(dtype) for p in pull)
        return diagonals, jax.random.normal(last, shape).astype(dtype)

    return draw(jax.random.key(seed))


def solve(matrix, b, wafer, tolerance: float = 1e-6, most: int = 200):
    """`x`, the iterations, and the relative residual, by one kernel that runs to convergence.

    In an iteration a PE sends its column to its four neighbors twice, and takes part in three
    all-reduces of one or two words over the whole wafer.
    """
    from jax.sharding import PartitionSpec as P

    cells = P("y", "x", None)
    kernel = functools.partial(_per_pe, tolerance=tolerance, most=most)
    run = wafer.map(kernel, in_specs=((cells,) * _DIAGONALS, cells), out_specs=(cells, P(), P()))
    return run(matrix, b)


def plain(matrix, b, tolerance: float = 1e-6):
    """The same system solved by `wk.bicgstab` on one array."""
    import jax
    import jax.numpy as jnp

    import wsekern as wk

    def shift(u, axis, by):
        pads = [(0, 0)] * 3
        pads[axis] = (1, 0) if by > 0 else (0, 1)
        kept = slice(None, -1) if by > 0 else slice(1, None)
        return jnp.pad(u, pads)[tuple(kept if d == axis else slice(None) for d in range(3))]

    @jax.jit
    def run(matrix, b):
        def operator(u):
            ways = [(0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)]
            return u + sum(
                c * shift(u, axis, by) for c, (axis, by) in zip(matrix, ways, strict=True)
            )

        solution = wk.bicgstab(operator, b, tolerance=tolerance, max_iterations=200)
        return solution.x, solution.iterations, solution.residual / jnp.linalg.norm(b.ravel())

    return run(matrix, b)


def published_time() -> str:
    """The time of an iteration on WSE-1: the paper's, and the estimate for this kernel."""
    import jax
    import jax.numpy as jnp

    import wsekern as wk

    wafer = wk.Wafer.abstract(wk.WSE1, 600, 595)
    field = jax.ShapeDtypeStruct((600, 595, _PUBLISHED_DEPTH), jnp.float16)
    one, two = (
        wk.estimate(
            functools.partial(solve, wafer=wafer), (field,) * _DIAGONALS, field,
            wafer=wafer, trips=trips,
        )
        for trips in (10, 20)
    )  # fmt: skip
    seconds = (two.seconds - one.seconds) / 10
    return (
        f"an iteration at depth {_PUBLISHED_DEPTH} in float16 on WSE-1: published "
        f"{1e6 * _PUBLISHED_SECONDS:.1f} us, estimated {1e6 * seconds:.1f} us"
    )


def _time_once(name, run, matrix, b):
    """The time of a single run, and its solution."""
    import jax

    program = harness.compile_program(run, matrix, b)
    begun = time.perf_counter()
    x, iterations, residual = jax.block_until_ready(program())
    seconds = time.perf_counter() - begun
    result = harness.Timing(
        name=name,
        seconds=seconds,
        ratio=1.0,
        low=1.0,
        high=1.0,
        compile_seconds=program.compile_seconds,
        temp_bytes=program.temp_bytes,
        note=f"{int(iterations)} iterations to {float(residual):.1e}",
    )
    return result, x


def _per_pe(matrix, b, tolerance, most):
    import jax.numpy as jnp
    from jax import lax

    apply = functools.partial(_apply_matrix, matrix)
    (bb,) = _sums((b, b))

    def body(state):
        x, r, p, rho, _, k = state
        v = apply(p)
        (across,) = _sums((b, v))  # the shadow residual is the first one
        alpha = rho / across
        s = _plus(r, -alpha, v)
        t = apply(s)
        ts, tt = _sums((t, s), (t, t))
        omega = ts / tt
        x = _plus(_plus(x, alpha, p), omega, s)
        r = _plus(s, -omega, t)
        new, rr = _sums((b, r), (r, r))
        beta = new / rho * (alpha / omega)
        p = _plus(r, beta, _plus(p, -omega, v))
        return x, r, p, new, rr, k + 1

    def should_continue(state):
        *_, rr, k = state
        return (rr > tolerance**2 * bb) & (k < most)

    start = (b - b, b, b, bb, bb, jnp.int32(0))  # b - b: zeros that JAX knows to vary from PE to PE
    x, _, _, _, rr, k = lax.while_loop(should_continue, body, start)
    return x, k, jnp.sqrt(rr / bb)


def _apply_matrix(matrix, u):
    """The matrix times `u`: from the four neighbor columns and the cells above and below."""
    north, south, west, east, below, above = matrix
    out = u + north * _shift_field(u, "y", 1, 0) + south * _shift_field(u, "y", -1, 0)
    out = out + west * _shift_field(u, "x", 1, 1) + east * _shift_field(u, "x", -1, 1)
    return out + below * _shift_tile(u, 2, 1) + above * _shift_tile(u, 2, -1)


def _shift_field(u, along, by, axis):
    """`u` moved by one cell along y or x, over the whole field; zeros enter at its edge."""
    from wsekern import fabric

    last = u.shape[axis] - 1
    edge = u.take(last if by > 0 else 0, axis)[None]
    arrived = fabric.shift(edge, along, by, periodic=False)[0]
    return _shift_tile(u, axis, by, arrived) if last else arrived.reshape(u.shape)


def _shift_tile(u, axis, by, arrived=None):
    import jax.numpy as jnp

    kept = u[(slice(None),) * axis + (slice(None, -1) if by > 0 else slice(1, None),)]
    fresh = jnp.zeros_like(u.take(0, axis)) if arrived is None else arrived
    parts = [jnp.expand_dims(fresh, axis), kept]
    return jnp.concatenate(parts if by > 0 else parts[::-1], axis)


def _plus(a, scale, b):
    return a + scale.astype(a.dtype) * b


def _sums(*pairs):
    """Inner products over the whole wafer in float32, in one all-reduce."""
    import jax.numpy as jnp

    from wsekern import fabric

    partial = jnp.stack([jnp.sum(a.astype("float32") * b.astype("float32")) for a, b in pairs])
    return list(fabric.all_reduce(partial, ("y", "x")))
