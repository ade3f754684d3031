"""The gradient of a wave with respect to its velocity: time and memory against the wave itself.

A 2-D wave runs for many steps on one device; candidates are its gradient with checkpointing, its
gradient with every state kept, and the same in plain jnp. They run in turn; the ratio is to the
wave alone. Command: `python -m benchmarks wave_gradient`
"""

import dataclasses
import functools
import pathlib

import tyro

from benchmarks import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveGradientOptions:
    """Time a 2-D wave on one device, and its gradients."""

    size: int = 512
    """Rows, and columns, of the field."""
    steps: int = 1000
    """Steps of the wave."""
    kept: int = 100
    """Steps of the gradients that keep every state, which need much memory."""
    rounds: int = 5
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table; the baseline is the wave alone."""
    options = tyro.cli(WaveGradientOptions, prog="python -m benchmarks wave_gradient", args=argv)
    harness.start(1)
    harness.show_environment()
    candidates, steps = _candidates(options)
    results = harness.compare(candidates, "wave", rounds=options.rounds)
    field = 4 * options.size**2
    each = next(r.seconds for r in results if r.name == "wave") / options.steps
    columns = {
        "us a step": lambda r: f"{r.seconds / steps[r.name] * 1e6:.0f}",
        "over the wave, a step": lambda r: f"{r.seconds / steps[r.name] / each:.1f}",
        "fields kept": lambda r: f"{r.temp_bytes / field:.0f}",
    }
    title = f"gradient of a wave of {options.size}^2"
    harness.show(title, results, columns)
    if options.json:
        harness.dump(options.json, {title: results})


def _candidates(options: WaveGradientOptions):
    import jax
    import jax.numpy as jnp

    import wsekern as wk

    u = jax.random.normal(jax.random.key(0), (options.size,) * 2)
    c = jnp.full_like(u, 0.2)

    def energy(c, u, steps, step_by):
        return jnp.sum(step_by(c, u, steps) ** 2)

    def ours(c, u, steps, checkpoint=None):
        options = {"coefficients": c, "checkpoint": checkpoint}
        return wk.stencil({"u": u, "before": u}, _wave, radius=1, steps=steps, **options)["u"]

    def plain(c, u, steps):
        around = jnp.pad(c, 1)

        def step(state, _):
            return _wave({k: jnp.pad(f, 1) for k, f in state.items()}, around), None

        return jax.lax.scan(step, {"u": u, "before": u}, length=steps)[0]["u"]

    sqrt = functools.partial(ours, checkpoint="sqrt")
    all_of = {
        "wave": (energy, ours, options.steps),
        'gradient, checkpoint="sqrt"': (jax.grad(energy), sqrt, options.steps),
        "gradient, all kept": (jax.grad(energy), ours, options.kept),
        "wave, jnp.pad and scan": (energy, plain, options.kept),
        "its gradient, all kept": (jax.grad(energy), plain, options.kept),
    }
    programs = {
        name: harness.compile_program(functools.partial(run, steps=steps, step_by=by), c, u)
        for name, (run, by, steps) in all_of.items()
    }
    return programs, {name: steps for name, (_, _, steps) in all_of.items()}


def _wave(state, c):
    inside = (slice(1, -1),) * 2
    u = state["u"]
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    new = 2 * u[inside] - state["before"][inside] + c[inside] * (around - 4 * u[inside])
    return {"u": new, "before": u[inside]}
