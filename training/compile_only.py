"""Compile a training step for chips that need not be there: `python -m training --compile-only`."""

from __future__ import annotations

import dataclasses
import sys

import wsekern as wk
from training.config import TrainingConfig
from training.initial_model import find_initial_model
from training.plan import make_plan
from training.programs import step_program
from wsekern.compiler.search import compare_wafers, search_batch
from wsekern.estimator.pictures import output
from wsekern.progress import show_progress
from wsekern.wafer.launch import make_topology, parse_grid

_DEFAULT_WAFER = TrainingConfig.wafer


def compile_step(config: TrainingConfig) -> int:
    """Prints what the compiler makes of a run's step; returns 0 if it fits, 1 if it does not.

    Raises:
      ValueError: the topology is unknown, or a grid or the batch does not fit it.
      ImportError: the compiler of these chips is not installed.
    """
    assert config.target is not None
    if config.html is not None:
        output.check_writable(config.html)
    grids = config.layouts or (_grid(config),)
    wafers = {grid: make_topology(config.target, grid) for grid in grids}
    wafer = next(iter(wafers.values()))
    text, shown = "", None
    if len(wafers) > 1:
        text, shown = compare_wafers(lambda wafer: _compile(config, wafer), wafers)
    elif config.largest_batch:

        def compile_at(batch: int) -> wk.Compilation:
            return _compile(dataclasses.replace(config, batch=batch), wafer)

        unit = config.microbatch or wafer.wafers
        text, shown = search_batch(compile_at, config.batch, unit)
    else:
        shown = _compile(config, wafer)
    print(*filter(None, (text, shown)), sep="\n")
    if shown is not None and config.html is not None:
        shown.html(config.html)
        print(f"written to {config.html}", file=sys.stderr)
    return 0 if shown is not None and shown.fits else 1


def _grid(config: TrainingConfig) -> str:
    """The grid that the flags ask for; the chips' own unless --wafer is another."""
    assert config.target is not None
    own = wk.Wafer.topology(config.target)
    wafers, height, width = parse_grid(config.wafer)
    if config.wafer == _DEFAULT_WAFER and wafers * height * width != own.size:
        return "x".join(map(str, own.grid))
    return config.wafer


def _compile(config: TrainingConfig, wafer: wk.Wafer) -> wk.Compilation:
    grid = "x".join(map(str, wafer.grid))
    config = dataclasses.replace(config, wafer=grid, layouts=())
    start = find_initial_model(config)
    config = dataclasses.replace(config, context=config.context or start.context)
    plan = make_plan(config, start.sizes, wafer)
    function, shapes, options = step_program(plan)
    name = f"step of {config.model}, batch {config.batch} x {config.context} tokens, {config.dtype}"
    with show_progress(f"python -m training: compiling for {config.target}, {grid}"):
        return wk.compile(function, *shapes, wafer=wafer, name=name, **options)
