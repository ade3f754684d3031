"""This file is a plan as tables, as JSON and as a web page: `python -m models plan`."""

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

from models.arguments import PlanCommand
from models.checkpoints.reading import read_config
from models.config import DecoderConfig
from models.decoder import Decoder
from models.planning.chips import chips_of
from models.planning.memory import capacity
from models.planning.plan import DeploymentPlan, check, plan, scale_out
from models.presets import PRESETS
from wsekern.estimator.command import machine_called
from wsekern.estimator.pictures import figure, output, page, scaling
from wsekern.estimator.report import with_unit
from wsekern.hardware import ACCELERATORS, CLUSTERS, GB, Accelerator, Machine

Rows = list[tuple[str, ...]]


def run(asked: PlanCommand) -> int:
    """Prints a plan; an exit status."""
    machine, wafers = _machine(asked.machine)
    if asked.html is not None:
        output.check_writable(asked.html)
        figure.check_installed()
    config = _config(asked.model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(Decoder.shapes(config))))
    if isinstance(machine, Accelerator):
        return _of_chips(asked, config, parameters, machine)
    found = plan(
        config,
        name=asked.model,
        parameters=parameters,
        mode=asked.mode,
        machine=machine,
        wafers=wafers if asked.wafers is None else asked.wafers,
        context=asked.context,
        batch=asked.batch,
        side=asked.side,
        clock_hz=asked.clock and asked.clock * 1e9,
    )
    if asked.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(tables(found))
    if asked.html is not None:
        output.write(asked.html, page_of(found))
        print(f"written to {asked.html}", file=sys.stderr)
    return 0


def tables(p: DeploymentPlan) -> dict[str, Rows]:
    """What there is to say, by the heading; the first row of all but the first is its columns'."""
    found: dict[str, Rows] = {"": _figures(p), "parts": _parts(p), "memory of a PE": _memory(p)}
    if len(p.layouts) > 1:
        found["layouts"] = _layouts(p)
    if p.mode == "train" and p.wafers > 1:
        rows = [(f"{n:,}", with_unit(s, "s"), f"{share:.0%}") for n, s, share in scale_out(p)]
        found["the same step on fewer wafers"] = [("wafers", "time", "of ideal"), *rows]
    found["chips at their roofline"] = _chips(p)
    found["assumptions"] = [("of", "what is assumed"), *_ASSUMPTIONS[p.mode]]
    return found


def as_json(p: DeploymentPlan) -> dict[str, Any]:
    """The figures of a plan, in SI units."""
    fields = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name != "layouts"}
    names = "seconds stream_seconds tokens wafers_needed fewest_wafers resident sram".split()
    fields |= {name: getattr(p, name) for name in names}
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


def show(found: dict[str, Rows]) -> None:
    """Prints tables to standard output."""
    console = Console()
    for heading, rows in found.items():
        table = Table(box=None, show_header=bool(heading), title=heading or None,
                      title_justify="left", title_style="bold", pad_edge=False)  # fmt: skip
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
    found = tables(p)
    energy = p.energy_per_token
    cards = [
        ("", _rate(p.tokens / p.seconds), "tokens/s"),
        ("", with_unit(p.seconds, "s"), p.mode),
        ("" if p.resident or p.mode == "train" else "bad",
         "resident" if p.resident else "streamed", "weights"),
        ("", "not known" if energy is None else with_unit(energy, "J"), "a token"),
        ("", f"{sum(p.sram.values()) / capacity(p.machine):.0%}", "of a PE's memory"),
    ]  # fmt: skip
    parts = [page.render_cards(cards), page.render_table(("", ""), found.pop(""), numbers=())]
    parts.append(page.render_pictures(_pictures(p)))
    for heading, (head, *rows) in found.items():
        numbers = range(1, len(head)) if heading != "assumptions" else ()
        parts += [
            f"<h2>{heading[0].upper() + heading[1:]}</h2>",
            page.render_table(head, rows, numbers=list(numbers)),
        ]
    of = f"{p.model} on {p.wafers:,} x {p.machine.system}"
    told = "Planned by wsekern off traces of its parts; nothing was run."
    return page.render_document(f"{of}: {p.mode}", told, parts)


def _pictures(p: DeploymentPlan) -> list[tuple[Callable[[], Any], str]]:
    drawn = []
    if len(p.layouts) > 1:
        line: dict[str, list] = {
            p.mode: [(q.regions.side, q.tokens / q.seconds) for q in p.layouts]
        }
        drawn.append(
            (lambda: scaling.draw_scaling(line, {}, "PEs a side of a region", "tokens/s"),
             "What regions of other sizes would give.")
        )  # fmt: skip
    if p.mode == "train" and p.wafers > 1:
        steps = {"predicted": [(n, p.tokens / s) for n, s, _ in scale_out(p)]}
        drawn.append(
            (lambda: scaling.draw_scaling(steps, {}, "wafers", "tokens/s", ideal=True),
             "The same step on fewer wafers.")
        )  # fmt: skip
    return drawn


def _layouts(p: DeploymentPlan) -> Rows:
    rows: Rows = [("regions", "time", "tokens/s", "wafers that hold it")]
    for q in p.layouts:
        chosen = " (taken)" if q.regions == p.regions else ""
        rows.append(
            (f"{q.regions.down}x{q.regions.across} of {q.regions.side}x{q.regions.side}{chosen}",
             with_unit(q.seconds, "s"), _rate(q.tokens / q.seconds),
             "-" if q.wafers_needed is None else f"{q.wafers_needed:,}")
        )  # fmt: skip
    return rows


def _figures(p: DeploymentPlan) -> Rows:
    of = f"{p.machine.system} ({p.machine.name})"
    energy = p.energy_per_token
    what = {
        "decode": f"a token of {_many(p.batch, 'sequence')} with {p.context:,} in the cache",
        "prefill": f"{_many(p.batch, 'prompt')} of {p.context:,} tokens",
        "train": f"a step of {_many(p.batch, 'sequence')} of {p.context:,} tokens",
    }[p.mode]
    rows: Rows = [
        ("model", f"{p.model}, {p.parameters:,} parameters of 16 bits"),
        ("machine", f"{p.wafers:,} x {of} at {p.clock_hz / 1e9:.3g} GHz"),
        ("layout", f"{p.regions} on a wafer, {_used(p):.0%} of its PEs"),
        ("weights", _weights(p)),
        ("what", what),
        ("time", f"{with_unit(p.seconds, 's')} ({_bound(p)})"),
        ("throughput", f"{_rate(p.tokens / p.seconds)} tokens/s"),
        ("energy", "not known" if energy is None else f"{with_unit(energy, 'J')} a token"),
    ]
    if p.mode == "decode" and p.resident and p.regions_needed and p.regions_needed > 1:
        rows.append(("in flight", _in_flight(p)))
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
    return f"computing {compute}, streaming {stream}, one while the other"


def _in_flight(p: DeploymentPlan) -> str:
    """What the other regions can do while one has the token."""
    assert p.regions_needed is not None
    cache = p.sram["cache"] * p.regions_needed
    free = capacity(p.machine) - p.sram["weights"] - p.sram["working"]
    many = max(1, min(p.regions_needed, int(p.regions_needed * free / cache) if cache else 1))
    rate = many * p.tokens / p.seconds
    return f"{many} batches at once, one a region, have room: {_rate(rate)} tokens/s in all"


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
    rows: Rows = [("for", "bytes", "of what there is")]
    rows += [(name, f"{value:,.0f}", f"{value / free:.0%}") for name, value in used.items()]
    total = sum(used.values())
    return [*rows, ("all", f"{total:,.0f} of {free:,}", f"{total / free:.0%}")]


def _chips(p: DeploymentPlan) -> Rows:
    rows: Rows = [("chip", "number", "time", "tokens/s", "beside the wafers")]
    for c in p.accelerators:
        rows.append(
            (c.chip.name, f"{c.count:,}", with_unit(c.seconds, "s"),
             _rate(p.tokens / c.seconds), f"{p.seconds / c.seconds:.3g} x as fast")
        )  # fmt: skip
    return rows


def _used(p: DeploymentPlan) -> float:
    return p.regions.count * p.regions.side**2 / p.machine.usable_pes


def _of_chips(asked: PlanCommand, config: DecoderConfig, parameters: int, chip: Accelerator) -> int:
    for name in ("side", "clock", "html"):
        if getattr(asked, name) is not None:
            raise ValueError(f"{name} is for wafers, and {chip.name} is none; leave it out")
    context = min(config.context, 4096) if asked.context is None else asked.context
    batch, wafers = (1 if n is None else n for n in (asked.batch, asked.wafers))
    check(wafers=wafers, context=context, batch=batch, most=config.context)
    c = chips_of(config, parameters, asked.mode, chip, context, batch, asked.wafers)
    tokens = batch * (1 if asked.mode == "decode" else context)
    rows: Rows = [
        ("model", f"{asked.model}, {parameters:,} parameters of 16 bits"),
        ("machine", f"{c.count:,} x {chip.name}, {c.count * chip.memory_bytes / GB:,.0f} GB"),
        ("time", f"{with_unit(c.seconds, 's')} at their roofline"),
        ("throughput", f"{_rate(tokens / c.seconds)} tokens/s at most"),
    ]
    if asked.json:
        named = {"machine": chip.name, "count": c.count, "seconds": c.seconds}
        print(json.dumps(named | {"tokens_per_second": tokens / c.seconds}, indent=2))
    else:
        show({"": rows})
    return 0


def _machine(name: str) -> tuple[Machine | Accelerator, int]:
    """The machine of a name, and of how many wafers it is."""
    plain = name.lower().replace("-", "").replace("_", "")
    for cluster, (machine, wafers) in CLUSTERS.items():
        if plain == cluster.lower():
            return machine, wafers
    for chip in ACCELERATORS:
        if plain in (chip.kind.replace(" ", ""), chip.name.split()[0].lower()):
            return chip, 1
    others = [*(c.lower() for c in CLUSTERS), *(chip.kind for chip in ACCELERATORS)]
    near = difflib.get_close_matches(name.lower(), others, n=1, cutoff=0.6)
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


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


_LAYER = ("layers", "As WaferLLM lays them out: features over all PEs of a region, heads summed as "
          "one; each is priced off its trace by the estimator of wsekern.")  # fmt: skip
_HELD = ("weights", "16 bits. What the wafers have no room for is streamed to them for every token "
         "or prompt. The host keeps the embedding.")  # fmt: skip
_ALL = ("attention", "Each token attends to all: neither windows nor the causal half save any.")
_LATENCY = ("between wafers", "Words at the I/O's rate; its latency is not published, nor counted.")
_POWER = ("energy", "Whole systems under load, whatever their PEs do.")
_EXPERTS = ("experts", "As wide as those that a token chooses, in time; all of them in memory.")
_ROOFLINE = ("chips", "Weights are read once for a batch, nothing is lost between chips: at best. "
             "8 A100 reach an eighth of it, decoding LLaMA3-8B (WaferLLM).")  # fmt: skip
_ASSUMPTIONS: dict[str, Rows] = {
    "decode": [_LAYER, _HELD, _EXPERTS, _LATENCY, _POWER, _ROOFLINE],
    "prefill": [_LAYER, _ALL, _HELD, _EXPERTS, _LATENCY, _POWER, _ROOFLINE],
    "train": [
        _LAYER, _ALL,
        ("step", "Of a layer only its input is kept, the rest computed again. The optimizer runs "
         "where the weights are kept, meanwhile."),
        ("weights", "Streamed to every wafer forward and backward, the same to all; gradients, "
         "added up on their way, back: three times 16 bits a parameter."),
        _EXPERTS, _POWER, _ROOFLINE,
    ],
}  # fmt: skip
