"""This file is a timeline as trace-event JSON, which Perfetto and chrome://tracing open.

The format is the "Trace Event Format" document of the Chromium project: complete events (ph X) with
ts and dur in microseconds, on threads that metadata events (ph M) name. One process is one PE; all
run one program, and the walk of the estimator times one that stands for them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from wsekern.estimator.pictures import output
from wsekern.estimator.report import of_wafer

if TYPE_CHECKING:
    from wsekern.estimator.clocks import Event
    from wsekern.estimator.result import Estimate

LANES = {
    "compute": "compute",
    "N": "link N",
    "E": "link E",
    "S": "link S",
    "W": "link W",
    "wafer": "between wafers",
    "loop": "trips not walked",
}
_PID = 1


def timeline(e: Estimate, path: output.Path) -> None:
    """Writes the timeline of one PE: lanes for its engine and for the links each way.

    Of a loop whose trips come to take equally long, those that were walked are drawn; what stands
    for the others is one slice in a lane of its own.

    Args:
      e: an estimate.
      path: of the JSON file; https://ui.perfetto.dev opens it, and so does chrome://tracing.

    Raises:
      OSError: the path cannot be written.
    """
    output.write(path, json.dumps(trace_events(e), separators=(",", ":")))


def trace_events(e: Estimate) -> dict[str, Any]:
    """The timeline as the JSON object of a trace."""
    named = [_metadata("process_name", 0, name=f"one PE of {of_wafer(e)}")]
    for tid, title in enumerate(lanes(e).values(), 1):
        named += [
            _metadata("thread_name", tid, name=title),
            _metadata("thread_sort_index", tid, sort_index=tid),
        ]
    tids = {lane: tid for tid, lane in enumerate(lanes(e), 1)}
    ordered = sorted(e.events, key=lambda event: (event.start, event.end))
    slices = [_slice(event, tids[event.lane], e.clock_hz) for event in ordered]
    other = {
        "machine": e.machine.name,
        "grid": f"{e.wafer.height}x{e.wafer.width}",
        "clock_hz": e.clock_hz,
        "cycles": e.cycles,
    }
    return {"traceEvents": named + slices, "displayTimeUnit": "ns", "otherData": other}


def lanes(e: Estimate) -> dict[str, str]:
    """The lanes of an estimate's timeline, with their names; a PE's own are always there."""
    used = {event.lane for event in e.events}
    return {k: v for k, v in LANES.items() if k in used or k not in ("wafer", "loop")}


def _slice(event: Event, tid: int, clock_hz: float) -> dict[str, Any]:
    # Whole nanoseconds, so that what follows at once does not overlap once it is rounded.
    start, end = (round(cycle / clock_hz * 1e9) for cycle in (event.start, event.end))
    args = {"line": event.line, "cycles": round(event.end - event.start, 3)}
    return {
        "ph": "X",
        "pid": _PID,
        "tid": tid,
        "ts": start / 1000,
        "dur": (end - start) / 1000,
        "name": event.name,
        "cat": event.lane,
        "args": args,
    }


def _metadata(what: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": _PID, "tid": tid, "name": what, "args": args}
