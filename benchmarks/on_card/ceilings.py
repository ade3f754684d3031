"""What the card can do at most: by its data sheet, and measured by a large product and a copy."""

import dataclasses
import functools
from collections.abc import Iterator

from benchmarks import harness
from benchmarks.on_card.row import Row
from benchmarks.on_card.session import SHEET, Ceilings, Session

_COST = 6.0  # seconds


def run(session: Session) -> None:
    """Looks the card up and measures it, for the sections that follow."""
    import jax

    from wsekern.hardware import accelerator

    chip = accelerator(jax.devices()[0].device_kind)
    if chip is not None:
        session.ceilings = Ceilings(
            sheet_flops=chip.bfloat16_flops, sheet_bytes_per_second=chip.memory_bytes_per_second
        )
    session.measure("peak", _COST, functools.partial(_peak, session))
    session.measure("bandwidth", _COST, functools.partial(_bandwidth, session))


def _peak(session: Session) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp

    size = 512 if session.small else 8192
    # Random numbers: on zeros a card draws less power and runs faster.
    a, b = (jax.random.normal(key, (size,) * 2, "bfloat16") for key in jax.random.split(_key()))
    seconds = _seconds(harness.compile_program(jnp.matmul, a, b))
    rate, sheet = 2 * size**3 / seconds, session.ceilings.sheet_flops
    session.ceilings = dataclasses.replace(session.ceilings, flops=rate)
    measurement = f"product of {size} x {size}, bfloat16"
    yield _of_sheet(measurement, "jnp.matmul", seconds, rate, "FLOP/s", sheet)


def _bandwidth(session: Session) -> Iterator[Row]:
    import jax

    size = 2**22 if session.small else 2**29
    x = jax.random.normal(_key(), (size,))
    seconds = _seconds(harness.compile_program(lambda x: x + 1, x))
    rate, sheet = 2 * x.nbytes / seconds, session.ceilings.sheet_bytes_per_second
    session.ceilings = dataclasses.replace(session.ceilings, bytes_per_second=rate)
    measurement = f"x + 1 of {x.nbytes / 2**20:,.0f} MiB, float32"
    yield _of_sheet(measurement, "jnp.add", seconds, rate, "B/s", sheet)


def _of_sheet(
    measurement: str, candidate: str, seconds: float, rate: float, unit: str, sheet: float | None
) -> Row:
    """A rate as a share of what the data sheet says."""
    return Row(
        measurement=measurement,
        candidate=candidate,
        seconds=seconds,
        rate=rate,
        unit=unit,
        share=rate / sheet if sheet else None,
        ceiling=SHEET,
    )


def _seconds(program: harness.CompiledProgram) -> float:
    return harness.compare({"it": program}, "it", rounds=7, queued=True)[0].seconds


def _key():
    import jax

    return jax.random.key(0)
