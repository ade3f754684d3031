"""`/health`, `/metrics`, `/slots` and `/v1/tcp_warming`: how the server is doing."""

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from serving.api.errors import refuse
from serving.api.interface import Interface, send_bytes, send_object
from serving.api.metrics import CONTENT_TYPE


async def warm(interface: Interface, request: Request, send: Send) -> None:
    """Answers what Cerebras' client asks to open its connection."""
    await send_bytes(send, b"", kind="text/plain")


async def health(interface: Interface, request: Request, send: Send) -> None:
    """Says whether requests can be answered: 200, or 503 while loading, ending or broken.

    Once the models of the start are loaded, it is 200: a model that is loaded when it is asked for,
    or that has left memory, changes nothing.
    """
    state = _state(interface)
    is_ready = state == "ready"
    await send_object(send, {"status": "ok" if is_ready else state}, 200 if is_ready else 503)


async def metrics(interface: Interface, request: Request, send: Send) -> None:
    """Sends what Prometheus reads."""
    text = interface.metrics.text(_gauges(interface))
    await send_bytes(send, text.encode(), kind=CONTENT_TYPE)


async def slots(interface: Interface, request: Request, send: Send) -> None:
    """Sends what each slot of each model does; with `?format=full` pages, queues and totals too."""
    form = request.query_params.get("format", "default")
    if form not in ("default", "full"):
        refuse("format", f"format is {form[:40]!r}; it must be default or full")
    if form == "full":
        full = {"state": _state(interface), "models": _engines(interface)}
        await send_object(send, full)
        return
    listed: list[dict[str, Any]] = []
    for engine in _engines(interface):
        busy = engine["slots"]
        idle = [{"state": "idle"}] * max(0, engine["max_streams"] - len(busy))
        for slot in [*busy, *idle]:
            is_processing = slot["state"] != "idle"
            listed.append(
                {
                    "model": engine["model"],
                    "is_processing": is_processing,
                    **slot,
                    "id": len(listed),
                }
                | ({"request": slot["id"]} if is_processing else {})
            )
    await send_object(send, listed)


def _state(interface: Interface) -> str:
    """Whether requests can be answered: "ready", "loading", "ending" or "failed"."""
    state = "ending" if interface.is_draining else interface.models.state
    if state == "ready" and not all(x.engine.is_alive for x in interface.models.loaded.values()):
        return "failed"
    return state


def _engines(interface: Interface) -> list[dict[str, Any]]:
    return [
        {"model": name, **dataclasses.asdict(served.engine.snapshot())}
        for name, served in interface.models.loaded.items()
    ]


def _gauges(interface: Interface) -> list[tuple[str, str, str, dict[str, float]]]:
    snapshots = {name: one.engine.snapshot() for name, one in interface.models.loaded.items()}
    rows: list[tuple[str, str, str, dict[str, float]]] = []
    for name, meaning in (
        ("max_streams", "Slots."),
        ("waiting", "Requests in the queue."),
        ("pages_total", "Pages of the cache."),
        ("pages_free", "Pages that hold nothing."),
        ("pages_evictable", "Pages kept for prompts to come."),
        ("pages_held", "Pages in use."),
    ):
        values = {model: float(getattr(one, name)) for model, one in snapshots.items()}
        rows.append((f"wsekern_{name}", meaning, "gauge", values))
    is_loaded = {card.name: float(card.name in snapshots) for card in interface.models.cards}
    rows.append(("wsekern_model_loaded", "Whether a model is in memory.", "gauge", is_loaded))
    busy = {model: float(len(one.slots)) for model, one in snapshots.items()}
    rows.append(("wsekern_slots_busy", "Slots in use.", "gauge", busy))
    names = sorted({name for one in snapshots.values() for name in one.totals})
    for name in names:
        values = {m: float(one.totals[name]) for m, one in snapshots.items() if name in one.totals}
        rows.append((f"wsekern_engine_{name}_total", "Counted by the engine.", "counter", values))
    return rows
