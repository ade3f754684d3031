"""Runs that are killed, stopped by signals at every moment, or found damaged on disk.

A kill or a signal starts the command twice, which takes most of a minute; damage needs no training.
"""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.damage.case import Case
from training import data
from training.checkpoint import Checkpoints
from training.run_folder import saved_steps

_ROOT = pathlib.Path(__file__).parents[2]
_STEPS = 40
_SECONDS = 5.0  # within which a signal ends a run
_WAIT = 300.0  # seconds for the slowest start on a busy machine
_FLAGS = (
    *("--wafer", "1x2", "--platform", "cpu", "--context", "32", "--batch", "4"),
    *("--log-every", "1", "--eval-every", "10", "--eval-batches", "1", "--keep", "2"),
    *("--checkpoint-every", "5", "--sample-tokens", "4"),
)


def cases(seed: int) -> list[Case]:
    """12 kills, 14 signals, 72 damaged run folders and caches."""
    rng = random.Random(seed)
    result = []
    for number in range(12):
        # Two before the first step; then anywhere up to the end.
        step = 0 if number < 2 else rng.randrange(1, _STEPS)
        seconds = rng.uniform(0, 6) if step == 0 else rng.uniform(0, 0.2)
        name = f"{number}: {seconds:.2f} s after " + (f"step {step}" if step else "the start")
        result.append(Case("kills", name, functools.partial(_check_kill, step, seconds)))
    for number in (signal.SIGTERM, signal.SIGINT):
        for moment in _MOMENTS:
            check = functools.partial(_check_signal, moment, number, rng.uniform(0, 0.3))
            result.append(Case("signals", f"{number.name} {moment}", check))
    for i in range(72):
        cut, tokens = i % 4 == 3, i % 3 == 2
        damage = _check_damaged_tokens if tokens else _check_damaged_checkpoint
        name = (
            f"{i}: a {'cut' if cut else 'flipped bit'} in {'tokens' if tokens else 'a checkpoint'}"
        )
        check = functools.partial(damage, random.Random(f"{seed} {i}"), cut)
        result.append(Case("damaged runs", name, check))
    return result


# ---- kills -------------------------------------------------------------------------------------


def _check_kill(step: int, seconds: float, folder: pathlib.Path) -> None:
    """Kills a run some time after a step, resumes it, and compares every loss with the whole run's.

    Args:
      step: the step after which the time runs; 0: the start of the process.
      seconds: the time.
      folder: an empty one.
    """
    run = folder / "run"
    process = _start(run, *_flags(_STEPS))
    try:
        _wait_for(lambda: len(_losses(run)) >= step, process)
        time.sleep(seconds)
        process.kill()
    finally:
        process.kill()
        process.communicate()
    begun = (run / "config.json").exists()
    assert begun or not saved_steps(run), "it saved steps without its configuration"
    _finish(run, *(["--resume"] if begun else _flags(_STEPS)))
    assert _losses(run) == _whole_losses(), "the resumed run has other losses"


# ---- signals -----------------------------------------------------------------------------------

# moment -> (text of the output or file to wait for, flags, whether anything is saved by then)
_MOMENTS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "importing": ("", (), False),
    "compiling": ("compiling the step", (), False),
    "compiling to resume": ("compiling the step", ("--resume", "--steps", "80"), True),
    "in a step": ("step 3", ("--steps", "100000", "--eval-every", "0"), True),
    "in a save": ("partial", ("--checkpoint-every", "1", "--steps", "100000"), True),
    "evaluating": ("step 5", ("--eval-every", "5", "--eval-batches", "100000"), True),
    "sampling": ("sampling", ("--steps", "5", "--sample-tokens", "20000"), True),
}


def _check_signal(
    moment: str, number: signal.Signals, seconds: float, folder: pathlib.Path
) -> None:
    """Sends a signal at a moment: the run ends in time, with the right status, and can go on."""
    run = folder / "run"
    text, flags, saved = _MOMENTS[moment]
    resumes = "--resume" in flags
    if resumes:
        shutil.copytree(_whole_run(), run)
    # Without what is kept of earlier runs, compiling takes long enough to be met.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")} if "compiling" in moment else {}
    process = _start(run, *([] if resumes else _flags(_STEPS)), *flags, **cache)
    try:
        if text == "partial":
            _wait_for(lambda: any(run.glob("checkpoints/[0-9]*.partial")), process)
        elif text.startswith("step"):
            _wait_for(lambda: len(_losses(run)) >= int(text.split()[1]), process)
        else:
            _wait_for(lambda: text in _log(run), process)
        time.sleep(seconds)
        sent = time.monotonic()
        process.send_signal(number)
        process.wait(_WAIT)
        took = time.monotonic() - sent
    finally:
        process.kill()
        process.wait()
    output = _log(run)
    assert "Traceback" not in output, output[-300:]
    # Before Python has started, the system itself ends the process; its status is then -number.
    wanted = (75,) if saved else (128 + number, -number)
    assert process.returncode in wanted, (process.returncode, output[-300:])
    assert took < _SECONDS, f"it took {took:.1f} s"
    if saved:
        steps = saved_steps(run)
        assert steps, "nothing is saved"
        # One more step; of a run that takes none, the sample that was cut short.
        more = steps[-1] if moment == "sampling" else steps[-1] + 1
        options = ["--steps", str(more), "--eval-batches", "1", "--sample-tokens", "4"]
        _finish(run, "--resume", *options)
        assert saved_steps(run)[-1] == more


# ---- damage ------------------------------------------------------------------------------------


def _check_damaged_checkpoint(rng: random.Random, cut: bool, folder: pathlib.Path) -> None:
    """Restoring gives a state that was saved, to the bit, or an error that names the damage."""
    shutil.copytree(_saved_states(), folder / "checkpoints")
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    newest = [path for path in files if path.relative_to(folder).parts[1] == "3"]
    damaged = _damage(rng, rng.choice(sorted(newest)), cut)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        step, state, extra = checkpoints.restore(_state(0))
        assert extra == {"step": step}
        for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(_state(step)), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes(), f"{damaged}: changed"
        assert step == 3 or checkpoints.skipped, f"{damaged}: nothing is said"


def _check_damaged_tokens(rng: random.Random, cut: bool, folder: pathlib.Path) -> None:
    """Tokens are those of the text, whatever is in the cache."""
    shutil.copytree(_cached_tokens(), folder, dirs_exist_ok=True)
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    damaged = _damage(rng, rng.choice(sorted(files)), cut)
    before, after = _open_corpus(_cached_tokens()), _open_corpus(folder)
    for name in ("train", "validation", "vocab", "alphabet", "fingerprint", "name", "skipped"):
        same = np.array_equal(getattr(before, name), getattr(after, name))
        assert same, f"{damaged}: {name} differs"


def _damage(rng: random.Random, path: pathlib.Path, cut: bool) -> str:
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= 1 << rng.randrange(8)
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return f"{path.parent.name}/{path.name} at {position}"


# ---- what the cases share ------------------------------------------------------------------------


def _flags(steps: int) -> list[str]:
    return ["--data", str(_text()), "--steps", str(steps), *_FLAGS]


def _start(run: pathlib.Path, *flags: str, **variables: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training", "--out", str(run), *flags]
    run.parent.mkdir(exist_ok=True)
    with (run.parent / "log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=_ROOT, stdout=log, stderr=log, env={**os.environ, **variables}
        )


def _finish(run: pathlib.Path, *flags: str) -> None:
    process = _start(run, *flags)
    try:
        assert process.wait(_WAIT) == 0, _log(run)[-300:]
    finally:
        process.kill()


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT
    while not ready():
        assert process.poll() is None, f"it ended by itself, with status {process.returncode}"
        assert time.monotonic() < deadline, "it did not come that far"
        time.sleep(0.002)


def _log(run: pathlib.Path) -> str:
    return (run.parent / "log").read_text(errors="replace")


def _losses(run: pathlib.Path) -> dict[int, float]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows}


@functools.cache
def _shared() -> pathlib.Path:
    """A folder for all cases, removed at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    _shared_folders.append(folder)
    return pathlib.Path(folder.name)


_shared_folders: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _text() -> pathlib.Path:
    path = _shared() / "text.txt"
    path.write_text("".join(f"The quick brown fox {i} jumps over it.\n" for i in range(3000)))
    return path


@functools.cache
def _whole_run() -> pathlib.Path:
    """A run that nothing has interrupted."""
    run = _shared() / "whole" / "run"
    _finish(run, *_flags(_STEPS))
    return run


@functools.cache
def _whole_losses() -> dict[int, float]:
    return _losses(_whole_run())


def _state(step: int) -> dict[str, object]:
    rng = np.random.default_rng(step)
    return {
        "w": jnp.asarray(rng.standard_normal((64, 48)), "float32"),
        "half": jnp.asarray(rng.standard_normal(100), "bfloat16"),
        "moments": [jnp.asarray(rng.standard_normal((3, 5, 7)), "float32"), jnp.zeros((0, 4))],
        "step": jnp.int32(step),
    }


@functools.cache
def _saved_states() -> pathlib.Path:
    folder = _shared() / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            troubles = checkpoints.save(step, _state(step), {"step": step}, wait=True)
            assert not troubles, troubles
    return folder


@functools.cache
def _cached_tokens() -> pathlib.Path:
    folder = _shared() / "tokens"
    _open_corpus(folder)
    return folder


def _open_corpus(folder: pathlib.Path) -> data.Corpus:
    return data.open_corpus(str(_text()), tokens="characters", context=32, cache=folder / "cache")
