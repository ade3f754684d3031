"""A step of the shallow sea against whole arrays under jit and against mpi4jax's measured program.

Candidates run in turn for many steps in one call; the ratio is to ours on the first grid. mpi4jax
runs in processes of its measured: each of its runs is divided by ours just before and just after.
Command: `python -m benchmarks shallow_water`
"""

import dataclasses
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import tyro

from benchmarks import harness
from benchmarks.example import example
from wsekern.wafer.launch import make_wafer, parse_grid

_CELLS = (180, 360)  # of mpi4jax's program
_ROUND = 100  # steps in one compiled call of their program
_COMPARED = 100  # steps after which the fields are compared
# Run by their Python. With steps it saves their fields; else their clock times a whole run.
_RUN = """
import importlib.util, sys
import numpy as np
path, days, steps, out = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
spec = importlib.util.spec_from_file_location("theirs", path)
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
if steps:
    first = theirs.ModelState(*theirs.get_initial_conditions(), *[theirs.jnp.zeros((182, 362))] * 3)
    last = theirs.do_multistep(theirs.shallow_water_step(first, True), steps - 1)
    np.savez(out, **{k: np.asarray(v)[1:-1, 1:-1] for k, v in last._asdict().items()})
else:
    theirs.solve_shallow_water(days * theirs.DAY_IN_SECONDS, theirs.PLOT_EVERY)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShallowWaterOptions:
    """Time a step of `examples/shallow_water.py`; ratios are to ours on the first grid.

    To time mpi4jax, give the path of its `examples/shallow_water.py` as --theirs, and a Python that
    has mpi4jax as --python; `mpirun` must be installed.
    """

    cells: tuple[int, int] = _CELLS
    """Height and length of the sea, in cells."""
    grids: tuple[str, ...] = ("1x1", "2x1", "2x4")
    """Grids of emulated devices, HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH."""
    steps: int = 500
    """Steps in a call."""
    rounds: int = 5
    """How often each candidate is timed."""
    theirs: pathlib.Path | None = None
    """Path of mpi4jax's program. None: it is not timed."""
    python: str = sys.executable
    """Python that runs it."""
    ranks: tuple[int, ...] = (1, 2)
    """MPI ranks to run it on."""
    days: float = 1.0
    """Days of the sea that a run of it computes."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    options = tyro.cli(ShallowWaterOptions, prog="python -m benchmarks shallow_water", args=argv)
    harness.start(max(math.prod(parse_grid(grid)) for grid in options.grids))
    harness.show_environment()
    candidates = _candidates(options)
    first = next(iter(candidates))
    results = harness.compare(candidates, first, rounds=options.rounds)
    results = [dataclasses.replace(r, seconds=r.seconds / options.steps) for r in results]
    if options.theirs is not None and options.cells == _CELLS:
        for dtype in ("float32", "float64"):
            apart = _differences(options, dtype)
            harness.console().print(f"apart after {_COMPARED} steps in {dtype}: {apart}")
        results += _theirs(options, candidates[first])
    rate = options.cells[0] * options.cells[1] / 1e6
    noted = [
        dataclasses.replace(r, note=f"{rate / r.seconds:.1f} M cells/s {r.note}") for r in results
    ]
    harness.show(f"a step of {options.cells[0]} x {options.cells[1]} cells, float32", noted)
    if options.json:
        harness.dump(options.json, {"shallow water": noted})


def _candidates(options):
    import jax

    from benchmarks import plain_sea

    sizes = example("shallow_water")
    land, sea = sizes.walls(*options.cells), sizes.jet(*options.cells)

    @jax.jit
    def plain(sea):
        def body(i, sea):
            return plain_sea.step(sea, land, sizes, i == 0)

        return jax.lax.fori_loop(0, options.steps, body, sea)

    def ours(grid):
        wafer = make_wafer(grid)

        def run():
            with wafer:
                return jax.block_until_ready(sizes.sail(sea, land, options.steps))

        return run

    candidates = {f"ours, {grid}": ours(grid) for grid in options.grids}
    candidates["whole arrays, one device"] = lambda: jax.block_until_ready(plain(sea))
    return candidates


def _theirs(options, mine) -> list[harness.Timing]:
    """The times of mpi4jax on each number of ranks, and their ratios to ours."""
    # Their program takes one step, then whole rounds of steps until the days are over.
    steps = _ROUND * math.ceil((options.days * 86_400 / example("shallow_water").STEP - 1) / _ROUND)
    seconds: dict[int, list[float]] = {ranks: [] for ranks in options.ranks}
    ratios: dict[int, list[float]] = {ranks: [] for ranks in options.ranks}
    for _ in range(options.rounds):
        for ranks in options.ranks:
            before = harness.compare({"mine": mine}, "mine", rounds=3)[0].seconds
            output = _run_theirs(options, ranks, options.days, 0, "")
            after = harness.compare({"mine": mine}, "mine", rounds=3)[0].seconds
            took = re.search(r"Solution took ([\d.]+)s", output)
            if took is None:
                raise SystemExit(f"mpi4jax on {ranks} ranks gives no time:\n{output[-500:]}")
            seconds[ranks].append(float(took[1]) / steps)
            ratios[ranks].append(2 * seconds[ranks][-1] / (before + after) * options.steps)
    return [
        harness.Timing(
            name=f"mpi4jax, {ranks} ranks",
            seconds=statistics.median(seconds[ranks]),
            ratio=statistics.median(measured),
            low=min(measured),
            high=max(measured),
        )
        for ranks, measured in ratios.items()
    ]


def _differences(options, dtype) -> str:
    """The largest difference of each field over its largest value, as text."""
    import jax
    import numpy as np

    sizes = example("shallow_water")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "fields.npz"
        _run_theirs(options, 1, 0.0, _COMPARED, str(path), dtype)
        theirs = dict(np.load(path))
    theirs["eta"] = theirs.pop("h") - sizes.DEPTH
    with jax.enable_x64(dtype == "float64"):
        ours = sizes.sail(sizes.jet(*_CELLS), sizes.walls(*_CELLS), _COMPARED)
        ours = jax.tree.map(np.asarray, ours)
    apart = {
        name: abs(ours[name] - theirs[name]).max() / abs(theirs[name]).max()
        for name in ("eta", "u", "v")
    }
    return ", ".join(f"{name} {value:.1e}" for name, value in apart.items())


def _run_theirs(options, ranks, days, steps, out, dtype="float32") -> str:
    mpirun = shutil.which("mpirun", path=str(pathlib.Path(options.python).parent)) or "mpirun"
    command = [mpirun, "--oversubscribe", "--allow-run-as-root", "-n", str(ranks)]
    command += [options.python, "-c", _RUN, str(options.theirs), str(days), str(steps), out]
    wide = os.environ | {"JAX_ENABLE_X64": str(int(dtype == "float64"))}
    output = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    if output.returncode:
        raise SystemExit(f"{mpirun} failed:\n{output.stdout[-500:]}{output.stderr[-2000:]}")
    return output.stdout
