"""Time candidates for the same work against the peer that a user would call without wsekern."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import wsekern as wk
from benchmarks import harness
from benchmarks.on_card.row import Row
from benchmarks.on_card.session import Session, failure

Build = Callable[[], harness.CompiledProgram]
_ROUNDS, _SMALL_ROUNDS = 7, 2
# How compiled programs name a kernel that XLA did not write itself.
_KERNELS = re.compile(r'custom_call_target="([^"]+)"|"kind":"(__triton[^"]+|__cudnn[^"]+)"')
_NOT_KERNELS = ("Sharding", "SPMD", "AllocateBuffer", "annotate_device_placement")


def race(
    session: Session,
    measurement: str,
    candidates: Mapping[str, Build],
    *,
    peer: str,
    work: float,
    unit: str,
    ceiling: tuple[float | None, str] = (None, ""),
    per_work: float = 1.0,
    cost: float,
) -> None:
    """Measures the candidates in turn; one that cannot be compiled gets a row that says why.

    Args:
      session: keeps the rows.
      measurement: what is done.
      candidates: name -> compiles it.
      peer: the candidate whose time the others' are divided by.
      work: done by one call, in what `unit` counts a second of.
      unit: such as "FLOP/s".
      ceiling: the highest rate, and its name.
      per_work: what the ceiling counts in a unit of work: bytes of a cell, FLOPs of a token.
      cost: seconds to compile and time one candidate on an H200, roughly.
    """

    def run() -> Iterator[Row]:
        built: dict[str, harness.CompiledProgram] = {}
        for name, build in candidates.items():
            if built and session.expect(cost) > session.left():
                yield Row(measurement=measurement, candidate=name, status="no time")
                continue
            try:
                built[name] = build()
            except Exception as error:  # the others are timed all the same
                row = failure(measurement, error, name)
                # A peer that cannot be had here says nothing about wsekern.
                yield dataclasses.replace(row, status="missing") if name == peer else row
        if not built:
            return
        baseline = peer if peer in built else next(iter(built))
        rounds = _SMALL_ROUNDS if session.small else _ROUNDS
        for result in harness.compare(built, baseline, rounds=rounds, queued=True):
            rate = work / result.seconds
            yield Row(
                measurement=measurement,
                candidate=result.name,
                seconds=result.seconds,
                ratio=result.ratio if peer in built and result.name != peer else None,
                rate=rate,
                unit=unit,
                share=rate * per_work / ceiling[0] if ceiling[0] else None,
                ceiling=ceiling[1],
                compile_seconds=result.compile_seconds,
                temp_bytes=result.temp_bytes,
                kernels=kernels_of(built[result.name]),
            )

    session.measure(measurement, cost * len(candidates), run)


def kernels_of(program: harness.CompiledProgram) -> tuple[str, ...]:
    """The kernels in a program that are the vendor's or Pallas's, by their names in its HLO."""
    text = None if program.text is None else program.text()
    names = dict.fromkeys(a or b for a, b in _KERNELS.findall(text or ""))
    return tuple(name for name in names if name not in _NOT_KERNELS)


def on_wafers(
    build: Callable[[Callable], harness.CompiledProgram], *, one_pe: bool = False
) -> dict[str, Build]:
    """Our candidates: without a wafer, and on one of a single PE, where the program is the same.

    Args:
      build: compiles, given a function that makes the wafer or None.
      one_pe: whether to time the second too.
    """
    makers: dict[str, Callable] = {"wsekern": lambda: None}
    if one_pe:
        makers["wsekern, 1x1"] = functools.partial(wk.Wafer.devices, 1, 1)
    return {name: functools.partial(build, make) for name, make in makers.items()}
