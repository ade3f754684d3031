"""A checkpoint loaded onto a wafer, time and memory, against reading and copying the file.

A random Llama's safetensors lie in the page cache. `models.load` puts them on a grid of emulated
devices; the baseline reads the same files into fresh memory and copies that once. Candidates run in
turn; anonymous memory of the process is sampled every few milliseconds.
Command: `python -m benchmarks load`
"""

import contextlib
import ctypes
import dataclasses
import gc
import math
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import tyro

from benchmarks import harness
from wsekern.wafer.launch import make_wafer, parse_grid

# name -> its differences from the preset 1b
_SIZES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "d_model": 2048,
        "d_ff": 5632,
        "layers": 22,
        "heads": 32,
        "kv_heads": 4,
        "vocab": 32_000,
    },
    "125m": {
        "d_model": 768,
        "d_ff": 2048,
        "layers": 12,
        "heads": 12,
        "kv_heads": 12,
        "vocab": 32_000,
    },
    "3m": {
        "d_model": 192,
        "d_ff": 512,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "vocab": 4_000,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Time a random Llama's safetensors, in the page cache, onto a wafer of emulated devices.

    The peak of memory is the process's anonymous memory above what it was before the run.
    """

    size: Literal["1.1b", "125m", "3m"] = "1.1b"
    """Size of the model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the checkpoint and of the parameters."""
    grid: str = "2x4"
    """Grid of the wafer, HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH."""
    rounds: int = 3
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints a table."""
    options = tyro.cli(LoadOptions, prog="python -m benchmarks load", args=argv)
    harness.start(math.prod(parse_grid(options.grid)))
    harness.show_environment()
    with tempfile.TemporaryDirectory() as folder:
        largest = _write(options, pathlib.Path(folder))
        results = _compare(options, pathlib.Path(folder), largest)
    if options.json:
        harness.dump(options.json, {"load": results})


def _write(options: LoadOptions, folder: pathlib.Path) -> int:
    """Writes the checkpoint; returns the bytes of its largest tensor."""
    import jax
    from flax import nnx

    import models

    config = dataclasses.replace(
        models.find_preset("1b"), **_SIZES[options.size], weights="out_in", tied=False
    )
    graph, shapes = nnx.split(models.Decoder.shapes(config))
    # The values do not matter, but zeros could all be one shared page of memory.
    state = jax.tree.map(
        lambda a: jax.numpy.full(a.shape, 0.01, options.dtype),
        shapes,
    )
    models.save(nnx.merge(graph, state), folder)
    return config.vocab * config.d_model * jax.numpy.dtype(options.dtype).itemsize


def _compare(options, folder, largest):
    import jax
    import numpy as np
    from flax import nnx

    import models
    from models.checkpoints.slots import bytes_of

    wafer = make_wafer(options.grid)
    files = sorted(folder.glob("*.safetensors"))
    peaks: dict[str, list[int]] = {"load": [], "stacked=False": [], "read and copy": []}
    weights = 0

    def load(name, stacked):
        nonlocal weights
        with _peak(peaks[name]):
            model = models.load(folder, options.dtype, wafer, stacked=stacked)
            jax.block_until_ready(nnx.state(model))
        weights = bytes_of(nnx.state(model))

    def read():
        with _peak(peaks["read and copy"]):
            whole = [np.fromfile(file, np.uint8) for file in files]
            copies = [array.copy() for array in whole]
        del whole, copies

    candidates = {
        "load": lambda: load("load", True),
        "stacked=False": lambda: load("stacked=False", False),
        "read and copy": read,
    }
    for run in candidates.values():
        run()
    for samples in peaks.values():  # of the warm-up
        samples.clear()
    results = harness.compare(candidates, "read and copy", rounds=options.rounds)
    title = f"{options.size}, {options.dtype}, {weights / 1e6:,.0f} MB, onto {options.grid}"
    noted = []
    for result in results:
        peak = max(peaks[result.name])
        note = f"peak {peak / weights:.2f} of the weights"
        if result.name != "read and copy":
            note += f"; {max(0, peak - weights) / largest:.2f} of the largest tensor beyond them"
        noted.append(dataclasses.replace(result, note=note))
    harness.show(title, noted)
    return noted


@contextlib.contextmanager
def _peak(peaks: list[int]) -> Iterator[None]:
    """Appends to `peaks` the growth of anonymous memory at its highest meanwhile, in bytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory is reused unseen
    before, most, done = _anonymous(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, _anonymous())
            time.sleep(0.003)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(max(most, _anonymous()) - before)


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
