"""The summary that a run shows before it starts: its mesh, sizes, bytes and FLOPs."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from sharding.explain import explain_state
from training.data import Corpus
from training.plan import RunPlan
from wsekern.hardware import accelerator
from wsekern.wafer.wafer import Wafer

_DRAWN_ROWS, _DRAWN_COLUMNS = 6, 8  # of a larger grid the middle is left out
_PROBE = 1024  # rows and columns of the matrix product that measures an unknown device's peak
_PROBES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The most arithmetic that the devices of a wafer can do together."""

    flops: float  # FLOP/s
    source: str  # where the figure is from, as text


def find_peak(wafer: Wafer, dtype: str) -> Peak:
    """The peak of a wafer's devices in `dtype`, from their data sheet or measured.

    A device without a data sheet in `wsekern.hardware` is measured, by the best of a few matrix
    products. Emulated devices share one CPU, so together they count as one device.
    """
    devices = [jax.devices()[0]] if wafer.mesh is None else list(wafer.device_mesh.devices.flat)
    chip = accelerator(devices[0].device_kind)
    rated = chip and (chip.bfloat16_flops if dtype == "bfloat16" else chip.float32_flops)
    if chip and rated:
        return Peak(flops=rated * len(devices), source=f"{len(devices)} x {chip.name}")
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return Peak(
        flops=count * _measure(devices[0], dtype),
        source=f"measured, {_PROBE} x {_PROBE} products in {dtype}",
    )


def header(plan: RunPlan, corpus: Corpus, peak: Peak) -> RenderableType:
    """A drawing of the mesh, and below it the model, the data, the bytes and the FLOPs."""
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(plan, corpus, peak):
        facts.add_row(name, value)
    return Group(mesh_drawing(plan.wafer), facts, "")


def mesh_drawing(wafer: Wafer) -> Table:
    """The grid of one wafer: in each PE the number of its device, or "y,x" if it is virtual."""
    grid = Table(box=box.SQUARE, show_header=False, show_lines=True)
    columns = _indices_to_draw(wafer.width, _DRAWN_COLUMNS)
    for y in _indices_to_draw(wafer.height, _DRAWN_ROWS):
        grid.add_row(*(_cell(wafer, y, x) for x in columns))
    return grid


def _facts(plan: RunPlan, corpus: Corpus, peak: Peak) -> Iterator[tuple[str, str]]:
    config, wafer = plan.config, plan.wafer
    params, state = (
        explain_state(shapes, wafer, plan.home) for shapes in (plan.shapes["params"], plan.shapes)
    )
    count = sum(row.size for row in params)
    where = "one device" if wafer.backend == "virtual" else "a device"
    per_device = sum(row.bytes_per_device for row in state)
    flops = plan.tokens_per_step * plan.sizes.flops_per_token(plan.context)
    passes = f" in {config.passes} passes" if config.passes > 1 else ""
    yield "wafer", _describe(wafer)
    yield "model", f"{config.model}: {count:,} parameters, computed in {config.dtype}"
    yield "state", f"{_bytes(per_device)} on {where}: float32 weights and two moments of AdamW"
    yield (
        "step",
        f"{config.batch} x {plan.context} = {plan.tokens_per_step:,} tokens{passes}, "
        f"{_si(flops)}FLOP",
    )
    yield (
        "data",
        f"{corpus.name}: {len(corpus.train):,} tokens to train on, {len(corpus.validation):,} to "
        "validate",
    )
    yield "peak", f"{_si(peak.flops)}FLOP/s ({peak.source})"
    yield "run", str(config.run_dir)


def _describe(wafer: Wafer) -> str:
    grid = f"{wafer.height} x {wafer.width} PEs"
    if wafer.wafers > 1:
        grid = f"{wafer.wafers} wafers of {grid} (the first is drawn)"
    if wafer.backend == "virtual":
        count = "one" if wafer.mesh is None else wafer.device_mesh.size
        return f"{grid}, virtual, on {count} {jax.devices()[0].device_kind}"
    device = wafer.device_mesh.devices.flat[0]
    kind = "emulated on this CPU" if device.platform == "cpu" else device.device_kind
    return f"{grid}, one device each, {kind}"


def _cell(wafer: Wafer, y: int | None, x: int | None) -> str:
    if y is None or x is None:
        return "..."
    if wafer.backend == "virtual":
        return f"{y},{x}"
    devices = wafer.device_mesh.devices
    return str((devices[0] if wafer.wafers > 1 else devices)[y, x].id)


def _indices_to_draw(length: int, most: int) -> list[int | None]:
    if length <= most:
        return list(range(length))
    return [*range(most - 2), None, length - 1]


def _measure(device: jax.Device, dtype: str) -> float:
    a = jax.device_put(jnp.ones((_PROBE, _PROBE), dtype), device)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * _PROBE**3 / min(times)


def _si(value: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value:,} bytes"
