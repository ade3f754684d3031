"""What the compiler of TPUs writes to files about a program, beside the program itself.

`Compiled.as_text` cannot print many programs of TPUs: it reads them back from a format that does
not know all of their asynchronous instructions. The files have the text of every program, also of
one that does not fit, and say what is live where memory is fullest:

    Live ranges at 5 (peak):
      fusion.5{}: 34359738368 bytes (cumulative: 34359738368 bytes)
      while.3{1}: 17179869184 bytes (cumulative: 51539607552 bytes)
    Stack trace breakdown for peak usage: 51 539 607 552 bytes
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from wsekern.compiler import hlo
from wsekern.estimator.memory import LiveArray
from wsekern.wafer.wafer import Wafer

# The last text of a program that fits, as `Compiled.as_text` gives it, and of one that does not.
_SCHEDULED, _TOO_LARGE = "*.after_codegen.txt", "*.oom_intermediate_module.txt"
_LIVE_RANGES = "*-live-range.txt"
_LIVE = re.compile(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes \(cumulative")


@contextlib.contextmanager
def dump_folder(wafer: Wafer) -> Iterator[tuple[pathlib.Path | None, dict[str, Any]]]:
    """A folder for the files while the block runs, and the options that make the compiler write.

    None and no options for other chips than TPUs, whose programs JAX can print.
    """
    if wafer.platform != "tpu":
        yield None, {}
        return
    with tempfile.TemporaryDirectory(prefix="wsekern-compile-") as folder:
        yield pathlib.Path(folder), {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def scheduled_text(folder: pathlib.Path | None) -> str:
    """The text of the program in its schedule; "" if there is none."""
    return _longest(folder, _SCHEDULED)


def arrays_at_peak(
    folder: pathlib.Path | None, line_of: Callable[[tuple[hlo.Frame, ...]], str]
) -> tuple[LiveArray, ...]:
    """What a chip holds when its memory is fullest, by the compiler; () if it does not say.

    Args:
      folder: that the compiler wrote to.
      line_of: the user's line of a stack.
    """
    ranges = _longest(folder, _LIVE_RANGES)
    try:
        program = hlo.parse(_longest(folder, _TOO_LARGE))
    except ValueError:
        return ()
    named = {one.name: one for c in program.computations.values() for one in c.instructions}
    found = []
    for line in ranges.partition("(peak):")[2].splitlines()[1:]:
        match = _LIVE.match(line)
        if match is None:
            break
        one = named.get(match[1])
        if one is not None:
            found.append(_live_array(one, match[2], int(match[3]), program, line_of))
    return tuple(found)


def _live_array(
    one: hlo.Instruction,
    index: str,
    size: int,
    program: hlo.Program,
    line_of: Callable[[tuple[hlo.Frame, ...]], str],
) -> LiveArray:
    # Of a tuple `index` says which part; of one with tuples in it, parts stand in a row.
    at = int(index) if index.isdigit() else 0
    shape = one.shapes[at] if at < len(one.shapes) else hlo.Shape("", ())
    made_by = one.operation.rpartition("/")[2]
    if one.opcode == "parameter":
        made_by = "argument" if one in program.main.instructions else "carried by a loop"
    return LiveArray(
        bytes=size,
        shape=shape.dims,
        dtype=shape.dtype,
        made_by=made_by or one.opcode,
        line="" if one.opcode == "parameter" else line_of(program.frames.get(one.frame or -1, ())),
    )


def _longest(folder: pathlib.Path | None, pattern: str) -> str:
    """The text of the longest file of that pattern; "" without any. A program may have helpers."""
    if folder is None:
        return ""
    texts = (path.read_text("utf-8", errors="replace") for path in folder.glob(pattern))
    return max(texts, key=len, default="")
