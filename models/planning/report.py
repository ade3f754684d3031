"""Report a plan as tables, as JSON and as a web page: `python -m models plan`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.arguments import PlanCommand
from models.checkpoints.reading import read_config
from models.config import DecoderConfig
from models.decoder import Decoder
from models.planning import compiled
from models.planning.chips import chips_of
from models.planning.memory import capacity
from models.planning.plan import DeploymentPlan, check, plan, scale_out
from models.presets import PRESETS
from wsekern.estimator.command import machine_called
from wsekern.estimator.pictures import figure, output, page, scaling
from wsekern.estimator.report import with_unit
from wsekern.hardware import ACCELERATORS, CLUSTERS, GB, Accelerator, Machine, clock_from_ghz
from wsekern.progress import show_progress

Rows = list[tuple[str, ...]]


def run(command: PlanCommand) -> int:
    """Prints the plan that `command` asks for; returns the exit status."""
    if command.target is not None:
        return compiled.run(command, _config(command.model))
    machine, wafers = _machine(command.machine)
    clock_hz = clock_from_ghz(command.clock)
    if command.html is not None:
        output.check_writable(command.html)
        figure.check_installed()
    config = _config(command.model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(Decoder.shapes(config))))
    if isinstance(machine, Accelerator):
        return _report_chips(command, config, parameters, machine)
    with show_progress(f"python -m models plan: pricing layouts of {command.model}"):
        chosen = plan(
            config,
            name=command.model,
            parameters=parameters,
            mode=command.mode,
            machine=machine,
            wafers=wafers if command.wafers is None else command.wafers,
            context=command.context,
            batch=command.batch,
            side=command.side,
            clock_hz=clock_hz,
        )
    if command.json:
        print(json.dumps(as_json(chosen), indent=2))
    else:
        show(tables(chosen))
    if command.html is not None:
        output.write(command.html, page_of(chosen))
        print(f"written to {command.html}", file=sys.stderr)
    return 0


def tables(p: DeploymentPlan) -> dict[str, Rows]:
    """The tables of a report, by heading. Each begins with a row of column names, but the first."""
    result: dict[str, Rows] = {"": _figures(p), "parts": _parts(p), "memory of a PE": _memory(p)}
    if len(p.layouts) > 1:
        result["layouts"] = _layouts(p)
    if p.mode == "train" and p.wafers > 1:
        rows = [(f"{n:,}", with_unit(s, "s"), f"{share:.0%}") for n, s, share in scale_out(p)]
        result["the same step on fewer wafers"] = [("wafers", "time", "of ideal"), *rows]
    result["chips at their roofline"] = _chips(p)
    result["assumptions"] = [("of", "what is assumed"), *_ASSUMPTIONS[p.mode]]
    return result


def as_json(p: DeploymentPlan) -> dict[str, Any]:
    """The figures of a plan, in SI units."""
    fields = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name != "layouts"}
    derived = "seconds stream_seconds tokens wafers_needed fewest_wafers resident sram".split()
    fields |= {name: getattr(p, name) for name in derived}
    return fields | {
        "machine": p.machine.name,
        "regions": dataclasses.asdict(p.regions),
        "parts": [dataclasses.asdict(part) for part in p.parts],
        "tokens_per_second": p.tokens / p.seconds,
        "energy_per_token": p.energy_per_token,
        "sram_free": capacity(p.machine),
        "layouts": [
            {
                "side": q.regions.side,
                "regions": q.regions.count,
                "seconds": q.seconds,
                "wafers_needed": q.wafers_needed,
            }
            for q in p.layouts
        ],
        "scaling": scale_out(p) if p.mode == "train" else [],
        "accelerators": [
            {"name": c.chip.name, "count": c.count, "seconds": c.seconds} for c in p.accelerators
        ],
    }


def show(tables: dict[str, Rows]) -> None:
    """Prints tables to standard output."""
    console = Console()
    for heading, rows in tables.items():
        # As a title of the table, a heading would be no wider than the table.
        if heading:
            console.print(Text(heading, style="bold"))
        table = Table(box=None, show_header=bool(heading), pad_edge=False)
        if heading:
            for place, name in enumerate(rows[0]):
                table.add_column(name, justify="left" if not place else "right")
            if heading == "assumptions":
                table.columns[1].justify = "left"
        for row in rows[1:] if heading else rows:
            table.add_row(*row)
        console.print(table)
        console.print()


def page_of(p: DeploymentPlan) -> str:
    """A plan as a web page that loads nothing else."""
    sections = tables(p)
    energy = p.energy_per_token
    of = {"decode": "a token of each sequence", "prefill": "the prompts", "train": "a step"}
    cards = [
        ("", _rate(p.tokens / p.seconds), "tokens/s"),
        ("", with_unit(p.seconds, "s"), of[p.mode]),
        ("" if p.resident or p.mode == "train" else "bad",
         "resident" if p.resident else "streamed", "weights"),
        ("", "not known" if energy is None else with_unit(energy, "J"), "a token"),
        ("", f"{sum(p.sram.values()) / capacity(p.machine):.0%}", "of a PE's memory"),
    ]  # fmt: skip
    parts = [page.render_cards(cards), page.render_table(("", ""), sections.pop(""), numbers=())]
    parts.append(page.render_pictures(_pictures(p)))
    for heading, (head, *rows) in sections.items():
        numbers = range(1, len(head)) if heading != "assumptions" else ()
        parts += [
            f"<h2>{heading[0].upper() + heading[1:]}</h2>",
            page.render_table(head, rows, numbers=list(numbers)),
        ]
    subject = f"{p.model} on {p.wafers:,} x {p.machine.system}"
    note = "Planned by wsekern from traces of the model's parts; nothing was run."
    return page.render_document(f"{subject}: {p.mode}", note, parts)


def _pictures(p: DeploymentPlan) -> list[tuple[Callable[[], Any], str]]:
    drawn = []
    if len(p.layouts) > 1:
        lines: dict[str, list] = {}
        for q in p.layouts:
            name = "weights resident" if q.resident else "weights streamed"
            lines.setdefault(name, []).append((q.regions.side, q.tokens / q.seconds))
        drawn.append(
            (lambda: scaling.draw_scaling(lines, {}, "PEs a side of a region", "tokens/s"),
             "The same with regions of other sizes.")
        )  # fmt: skip
    if p.mode == "train" and p.wafers > 1:
        steps = {"predicted": [(n, p.tokens / s) for n, s, _ in scale_out(p)]}
        drawn.append(
            (lambda: scaling.draw_scaling(steps, {}, "wafers", "tokens/s", ideal=True),
             "The same step on fewer wafers.")
        )  # fmt: skip
    return drawn


def _layouts(p: DeploymentPlan) -> Rows:
    trains = p.mode == "train"
    last = ("sequences",) if trains else ("weights", "wafers needed")
    rows: Rows = [("regions", "time", "tokens/s", *last)]
    for q in p.layouts:
        chosen = " (taken)" if q.regions == p.regions else ""
        held = "never fits" if q.wafers_needed is None else f"{q.wafers_needed:,}"
        rows.append(
            (f"{q.regions.down}x{q.regions.across} of {q.regions.side}x{q.regions.side}{chosen}",
             with_unit(q.seconds, "s"), _rate(q.tokens / q.seconds),
             *((f"{q.batch:,}",) if trains else ("resident" if q.resident else "streamed", held)))
        )  # fmt: skip
    return rows


def _figures(p: DeploymentPlan) -> Rows:
    machine = f"{p.machine.system} ({p.machine.name})"
    energy = p.energy_per_token
    task = {
        "decode": f"a token of {_many(p.batch, 'sequence')} with {p.context:,} in the cache",
        "prefill": f"{_many(p.batch, 'prompt')} of {p.context:,} tokens",
        "train": f"a step of {_many(p.batch, 'sequence')} of {p.context:,} tokens",
    }[p.mode]
    rows: Rows = [
        ("model", f"{p.model}, {p.parameters:,} parameters of 16 bits"),
        ("machine", f"{p.wafers:,} x {machine} at {p.clock_hz / 1e9:.3g} GHz"),
        ("layout", f"{p.regions} on a wafer, {_share_used(p):.0%} of its PEs"),
        ("weights", _weights(p)),
        ("task", task),
        ("time", f"{with_unit(p.seconds, 's')} ({_bound(p)})"),
        ("throughput", f"{_rate(p.tokens / p.seconds)} tokens/s"),
        ("energy", "not known" if energy is None else f"{with_unit(energy, 'J')} a token"),
    ]
    if p.mode == "decode" and p.resident and p.regions_needed and p.regions_needed > 1:
        rows += _in_flight(p)
    return rows


def _weights(p: DeploymentPlan) -> str:
    if p.mode == "train":
        return f"streamed, {with_unit(p.streamed_bytes, 'B')} a step through each wafer's I/O"
    if p.resident:
        needed = f"{_many(p.regions_needed or 0, 'region')}, {_many(p.wafers_needed or 0, 'wafer')}"
        return f"resident, in {needed}"
    streamed = f"{with_unit(p.streamed_bytes, 'B')} streamed to each wafer every time"
    return streamed + (f"; {p.fewest_wafers:,} wafers could hold them" if p.fewest_wafers else "")


def _bound(p: DeploymentPlan) -> str:
    compute, stream = with_unit(p.compute_seconds, "s"), with_unit(p.stream_seconds, "s")
    if p.resident:
        return "nothing is streamed"
    return f"computing {compute}, streaming {stream}, overlapped"


def _in_flight(p: DeploymentPlan) -> Rows:
    """How many batches the regions can work on at once, each a region; no row if it is one."""
    assert p.regions_needed is not None  # for type checkers: `resident` implies it
    cache = p.sram["cache"] * p.regions_needed
    free = capacity(p.machine) - p.sram["weights"] - p.sram["working"]
    many = max(1, min(p.regions_needed, int(p.regions_needed * free / cache) if cache else 1))
    rate = many * p.tokens / p.seconds
    said = f"{many} batches at once, one a region, have room: {_rate(rate)} tokens/s in all"
    return [("in flight", said)] if many > 1 else []


def _parts(p: DeploymentPlan) -> Rows:
    whole = sum(part.count * part.cycles for part in p.parts) or 1.0
    rows: Rows = [("part", "number", "cycles of one", "of the time", "FLOP/s a region")]
    for part in p.parts:
        rate = part.flops / part.cycles * p.clock_hz if part.cycles else 0.0
        rows.append(
            (part.name, f"{part.count:,}", f"{part.cycles:,.0f}",
             f"{part.count * part.cycles / whole:.1%}", with_unit(rate, "FLOP/s"))
        )  # fmt: skip
    return rows


def _memory(p: DeploymentPlan) -> Rows:
    free, used = capacity(p.machine), p.sram
    rows: Rows = [("use", "bytes", "share of memory")]
    rows += [(name, f"{value:,.0f}", f"{value / free:.0%}") for name, value in used.items()]
    total = sum(used.values())
    return [*rows, ("all", f"{total:,.0f} of {free:,}", f"{total / free:.0%}")]


def _chips(p: DeploymentPlan) -> Rows:
    rows: Rows = [("chip", "number", "time", "tokens/s", "speedup of the wafers")]
    for c in p.accelerators:
        rows.append(
            (c.chip.name, f"{c.count:,}", with_unit(c.seconds, "s"),
             _rate(p.tokens / c.seconds), f"{_rate(c.seconds / p.seconds)} x")
        )  # fmt: skip
    return rows


def _share_used(p: DeploymentPlan) -> float:
    return p.regions.count * p.regions.side**2 / p.machine.usable_pes


def _report_chips(
    command: PlanCommand, config: DecoderConfig, parameters: int, chip: Accelerator
) -> int:
    """Prints the roofline of chips, which have no regions to choose."""
    for name in ("side", "clock", "html"):
        if getattr(command, name) is not None:
            raise ValueError(f"{name} is for wafers, and {chip.name} is none; leave it out")
    context = min(config.context, 4096) if command.context is None else command.context
    batch, wafers = (1 if n is None else n for n in (command.batch, command.wafers))
    check(wafers=wafers, context=context, batch=batch, most=config.context)
    c = chips_of(config, parameters, command.mode, chip, context, batch, command.wafers)
    tokens = batch * (1 if command.mode == "decode" else context)
    rows: Rows = [
        ("model", f"{command.model}, {parameters:,} parameters of 16 bits"),
        ("machine", f"{c.count:,} x {chip.name}, {c.count * chip.memory_bytes / GB:,.0f} GB"),
        ("time", f"{with_unit(c.seconds, 's')} at their roofline"),
        ("throughput", f"{_rate(tokens / c.seconds)} tokens/s at most"),
    ]
    if command.json:
        named = {"machine": chip.name, "count": c.count, "seconds": c.seconds}
        print(json.dumps(named | {"tokens_per_second": tokens / c.seconds}, indent=2))
    else:
        show({"": rows})
    return 0


def _machine(name: str) -> tuple[Machine | Accelerator, int]:
    """The machine called `name`, and how many wafers it has."""
    plain = name.lower().replace("-", "").replace("_", "")
    for cluster, (machine, wafers) in CLUSTERS.items():
        if plain == cluster.lower():
            return machine, wafers
    for chip in ACCELERATORS:
        names = (chip.kind.replace(" ", ""), chip.name.lower().replace(" ", ""))
        if plain in (*names, *(n.removeprefix("tpu") for n in names), chip.name.split()[0].lower()):
            return chip, 1
    known = [*(c.lower() for c in CLUSTERS), *(chip.kind for chip in ACCELERATORS)]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if near:
        raise ValueError(f"machine {name!r} is not known; did you mean {near[0]!r}?")
    return machine_called(name), 1


def _config(name: str) -> DecoderConfig:
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.75)
    if near:
        raise ValueError(f"model {name!r} is no preset; did you mean {near[0]!r}?")
    return read_config(name)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_LAYER = (
    "layers",
    "Laid out as in WaferLLM: features over all PEs of a region, heads summed as one. Each is "
    "traced, and priced by wsekern's estimator.",
)
_WEIGHTS = (
    "weights",
    "16 bits. Weights that the wafers have no room for are streamed to them for every token or "
    "prompt. The host keeps the embedding.",
)
_ATTENTION = ("attention", "Each token attends to all: windows and causality save nothing.")
_LINKS = (
    "between wafers",
    "Words move at the I/O's rate. Its latency is not published, and not counted.",
)
_POWER = ("energy", "Power of whole systems under load, however busy the PEs are.")
_EXPERTS = ("experts", "In time, the experts that a token chooses; in memory, all of them.")
_ROOFLINE = (
    "chips",
    "The best case: weights are read once for a batch, links between chips cost nothing, a GPU "
    "launches 5 kernels a layer. 8 A100 reach an eighth of it, decoding LLaMA3-8B (WaferLLM).",
)
_STEP = (
    "step",
    "Of a layer only its input is kept; the rest is recomputed. The optimizer runs meanwhile, "
    "where the weights are stored.",
)
_STREAMING = (
    "weights",
    "Streamed to every wafer for the forward and the backward pass, the same to all. Gradients, "
    "summed on the way, go back: three times 16 bits a parameter.",
)
_ASSUMPTIONS: dict[str, Rows] = {
    "decode": [_LAYER, _WEIGHTS, _EXPERTS, _LINKS, _POWER, _ROOFLINE],
    "prefill": [_LAYER, _ATTENTION, _WEIGHTS, _EXPERTS, _LINKS, _POWER, _ROOFLINE],
    "train": [_LAYER, _ATTENTION, _STEP, _STREAMING, _EXPERTS, _POWER, _ROOFLINE],
}
