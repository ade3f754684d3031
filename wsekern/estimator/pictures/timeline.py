"""A timeline as trace-event JSON, which Perfetto and chrome://tracing open.

The format is the Chromium project's "Trace Event Format": complete events (ph X) with ts and dur in
microseconds, on threads that metadata events (ph M) name. The only process is one PE, which stands
for all: they run the same program.
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
    """Writes the timeline of one PE, with a lane for its engine and one for its links each way.

    A loop is drawn until its trips take equally long. One slice in a lane of its own stands for the
    other trips, and one in each lane that is busy in them, which says for what share of the time.

    Args:
      e: the estimate.
      path: of the JSON file, which https://ui.perfetto.dev and chrome://tracing open.

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
    """The lanes of an estimate's timeline with their titles; "wafer" and "loop" only if used."""
    used = {event.lane for event in e.events}
    return {k: v for k, v in LANES.items() if k in used or k not in ("wafer", "loop")}


def _slice(event: Event, tid: int, clock_hz: float) -> dict[str, Any]:
    # Whole nanoseconds: rounded ends and starts of slices that touch are the same number, whereas
    # viewers take slices that overlap by a fraction for nested ones.
    start, end = (round(cycle / clock_hz * 1e9) for cycle in (event.start, event.end))
    args: dict[str, Any] = {"line": event.line, "cycles": round(event.end - event.start, 3)}
    if event.share < 1:
        args["busy"] = f"{event.share:.1%}"
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


def _metadata(event: str, tid: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": _PID, "tid": tid, "name": event, "args": values}
