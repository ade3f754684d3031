"""This file is checkpoints: saved while training goes on, checked on disk, restored on any mesh.

A step is a folder with the arrays (Orbax's), and a manifest that is written after them and holds
their checksums. It gets its name only when it has been read back and found right, and older steps
are removed only then.
"""

import dataclasses
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from training import manifest
from training.manifest import Leaf, Manifest, Place

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_PARTIAL = ".partial"  # ends the name of a step that is not finished

_log = logging.getLogger(__name__)


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax logs what goes wrong with the trace of each of its threads, and then raises it.
    return "orbax" not in pathlib.Path(record.pathname).parts


logging.getLogger("absl").addFilter(_is_news)


@dataclasses.dataclass(frozen=True)
class _Copy:
    leaf: Leaf  # without its checksum, which the worker works out
    array: np.ndarray


class Checkpoints:
    """The checkpoints in one folder.

    A save goes on in the background; what goes wrong there is told by the next `save`, `wait` or
    `close`, each of which returns a line for every trouble since the last. `skipped` has a line for
    every step that the last `restore` passed over, with the reason.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3):
        """Looks at a folder, which need not exist yet.

        Args:
          directory: holds the steps and nothing else.
          keep: how many steps to keep, the newest ones.

        Raises:
          ValueError: `keep` is less than 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} must be 1 or more")
        self.directory = pathlib.Path(directory).absolute()
        self.keep = keep
        self.skipped: list[str] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        self._troubles: list[str] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        for trouble in self.close():
            _log.warning(trouble)

    def steps(self) -> list[int]:
        """The steps that are finished, oldest first; whether they are sound, `restore` tells."""
        return [step for step in self._numbered() if (self._folder(step) / _MANIFEST).exists()]

    def empty(self) -> bool:
        """Whether nothing was ever saved here."""
        return not self._numbered()

    def check_writable(self, state: Any = None) -> None:
        """Returns if checkpoints can be written here; call it before the first step of training.

        Args:
          state: the state to be saved, or its shapes; None leaves its size out of the question.

        Raises:
          OSError: the folder cannot be written, or the disk has no room for two checkpoints.
        """
        probe = self.directory / "writable.partial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"checkpoints cannot be written to {self.directory} ({error.strerror}); mend "
                "that or choose another --out"
            ) from error
        needed = 2 * sum(place.nbytes for place in manifest.places(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"two checkpoints need {_megabytes(needed)}, but {self.directory} has "
                f"{_megabytes(free)} free; make room or choose another --out"
            )

    def save(
        self,
        step: int,
        state: Any,
        extra: dict[str, Any],
        *,
        logical_shapes: Any = None,
        wait: bool = False,
    ) -> list[str]:
        """Copies `state` and writes the copy in the background; `state` may then be donated.

        It first waits for a save that is still going on, so that there is one copy at most.

        Args:
          step: names the checkpoint; one of the same step is replaced, later ones are removed (a
            resumed run has left their course).
          state: a pytree of arrays, laid out anyhow over the devices of this process.
          extra: kept beside it, as JSON.
          logical_shapes: a tree of the structure of `state`: the shapes without padding, which is
            not saved; None where nothing is padded.
          wait: return only when it is done.

        Returns:
          A line for each trouble since it was last asked.

        Raises:
          ValueError: `extra` is not JSON, a logical shape does not fit, or a leaf lies on devices
            of other processes.
        """
        Manifest(step=step, leaves=(), extra=extra).to_json()  # complains now, not in the worker
        self._settle()
        places = manifest.places(state, logical_shapes)
        copies = [_copy(number, place) for number, place in enumerate(places)]
        self._saving = self._worker.submit(self._save, step, copies, extra)
        return self.wait() if wait else self._told()

    def wait(self) -> list[str]:
        """Waits for the save that is going on; a line for each trouble since it was last asked."""
        self._settle()
        return self._told()

    def close(self) -> list[str]:
        """As `wait`; no save is possible afterwards."""
        troubles = self.wait()
        self._worker.shutdown()
        return troubles

    def restore(
        self, template: Any, step: int | None = None, *, logical_shapes: Any = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint that is sound: its step, state and extra.

        Every leaf's checksum is compared. Steps that are passed over are in `skipped`.

        Args:
          template: a pytree of `ShapeDtypeStruct`s (or arrays) with the sharding that the leaves
            shall have, on any mesh.
          step: this one and no other.
          logical_shapes: as for `save`; what the template has more is filled with zeros.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that of `step`.
          ValueError: none is sound and fits `template`; each is named with the reason.
        """
        self._settle()
        wanted = manifest.places(template, logical_shapes)
        numbered = self._numbered()
        if step is not None and step not in numbered:
            raise FileNotFoundError(
                f"{self.directory} has no checkpoint of step {step}, it has {numbered}"
            )
        if not numbered:
            raise FileNotFoundError(
                f"{self.directory} holds no checkpoint; leave --resume out to start anew"
            )
        self.skipped = []
        for candidate in reversed(numbered if step is None else [step]):
            try:
                found, arrays = _read(self._folder(candidate), wanted)
            except ValueError as error:
                self.skipped.append(f"step {candidate}: {error}")
                continue
            described = {leaf.path: leaf for leaf in found.leaves}
            leaves = [_put(place, arrays[place.path], described[place.path]) for place in wanted]
            return candidate, jax.tree.unflatten(jax.tree.structure(template), leaves), found.extra
        raise ValueError(
            f"no checkpoint in {self.directory} can be restored: " + "; ".join(self.skipped)
        )

    def _settle(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _told(self) -> list[str]:
        troubles, self._troubles = self._troubles, []
        return troubles

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _numbered(self) -> list[int]:
        names = [path.name for path in self.directory.glob("*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _save(self, step: int, copies: list[_Copy], extra: dict[str, Any]) -> None:
        partial = self.directory / f"{step}{_PARTIAL}"
        try:
            leaves = [
                dataclasses.replace(copy.leaf, sha256=manifest.checksum(copy.array))
                for copy in copies
            ]
            said = Manifest(step=step, leaves=tuple(leaves), extra=extra)
            if not _is_there(self._folder(step), said):
                shutil.rmtree(partial, ignore_errors=True)
                _write(partial, said, copies)
                if self._folder(step).exists():
                    shutil.rmtree(self._folder(step))
                partial.rename(self._folder(step))
        except Exception as error:  # whatever it is, training goes on
            shutil.rmtree(partial, ignore_errors=True)
            self._troubles.append(self._trouble(step, copies, error))
            return
        try:
            self._prune(step)
        except OSError as error:
            self._troubles.append(
                f"an old checkpoint in {self.directory} cannot be removed: {_reason(error)}"
            )

    def _prune(self, newest: int) -> None:
        finished = self.steps()
        kept = [step for step in finished if step <= newest][-self.keep :]
        for step in finished:
            if step not in kept:
                shutil.rmtree(self._folder(step))
        for partial in self.directory.glob(f"*{_PARTIAL}"):  # of a process that was killed
            shutil.rmtree(partial)

    def _trouble(self, step: int, copies: list[_Copy], error: Exception) -> str:
        size = sum(copy.array.nbytes for copy in copies)
        free = shutil.disk_usage(self.directory).free if self.directory.exists() else 0
        room = f"it needs {_megabytes(size)}, {_megabytes(free)} are free"
        good = [good for good in self.steps() if good != step]
        return (
            f"the checkpoint of step {step} was not written to {self.directory}: {_reason(error)}; "
            f"{room}; the last good one is {f'step {good[-1]}' if good else 'none'}"
        )


def _copy(number: int, place: Place) -> _Copy:
    leaf = place.leaf
    key = jax.random.key_impl(leaf) if manifest.is_key(leaf) else None
    described = Leaf(
        path=place.path,
        stored=f"{number:04}." + re.sub(r"[^\w.-]", ".", place.path),
        shape=place.shape,
        dtype=str(leaf.dtype),
        sha256="",
        key=None if key is None else str(key),
    )
    if key is not None:
        return _Copy(described, np.array(jax.random.key_data(leaf)))
    if not isinstance(leaf, jax.Array):
        return _Copy(described, np.array(leaf[tuple(map(slice, place.shape))]))
    if not leaf.is_fully_addressable:
        raise ValueError(
            f"{place.path} lies on devices of several processes; gather it to each process first"
        )
    # Shard by shard into fresh memory: a view, or the copy that jax keeps of an array it was asked
    # for, would be in the way when the next step takes over the buffer.
    array = np.empty(place.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            part = array[(*shard.index, ...)]  # a view, of a scalar too
            part[...] = np.asarray(shard.data)[tuple(map(slice, part.shape))]
    return _Copy(described, array)


def _is_there(folder: pathlib.Path, said: Manifest) -> bool:
    try:
        if (folder / _MANIFEST).read_text() != said.to_json():
            return False
        _load(folder, said.leaves)
    except (OSError, ValueError):
        return False
    return True


def _write(folder: pathlib.Path, said: Manifest, copies: list[_Copy]) -> None:
    """Writes a whole step to `folder` and reads it back."""
    folder.mkdir(parents=True)
    with _store() as store:
        arrays = {copy.leaf.stored: copy.array for copy in copies if copy.array.size}
        store.save(folder / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
    with (folder / _MANIFEST).open("w") as file:
        file.write(said.to_json())
        file.flush()
        os.fsync(file.fileno())
    _load(folder, said.leaves)


def _read(folder: pathlib.Path, wanted: Sequence[Place]) -> tuple[Manifest, dict[str, np.ndarray]]:
    """What a step's folder holds, by path; a ValueError says why it cannot be used."""
    try:
        text = (folder / _MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"its {_MANIFEST} cannot be read ({_reason(error)}): saving was cut short, or another "
            "program wrote it"
        ) from None
    found = Manifest.from_json(text)
    if str(found.step) != folder.name:
        raise ValueError(f"its manifest is that of step {found.step}")
    leaves = manifest.rename_old_leaves(found.leaves, wanted)
    found = dataclasses.replace(found, leaves=tuple(leaves))
    differing = manifest.mismatches(leaves, wanted)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError("it is of another state: " + "; ".join(differing[:3]) + more)
    return found, _load(folder, found.leaves)


def _load(folder: pathlib.Path, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    """The arrays of all `leaves` by path; a ValueError names the first that is damaged."""
    stored = [leaf for leaf in leaves if 0 not in leaf.shape]
    try:
        arrays = _fetch(folder, stored)
    except Exception:  # of many kinds, few of which say where: look at one after the other
        arrays = {}
        for leaf in stored:
            try:
                arrays |= _fetch(folder, [leaf])
            except Exception as error:
                raise ValueError(f"{leaf.path} cannot be read ({_reason(error)})") from None
    for leaf in leaves:
        if 0 in leaf.shape:
            arrays[leaf.path] = np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
        if manifest.checksum(arrays[leaf.path]) != leaf.sha256:
            raise ValueError(f"the checksum of {leaf.path} differs: its bytes have changed")
    return arrays


def _fetch(folder: pathlib.Path, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    whole = {leaf.stored: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in leaves}
    with _store() as store:
        item = {name: 0 for name in whole}
        args = ocp.args.PyTreeRestore(item, restore_args=whole, partial_restore=True)
        arrays = store.restore(folder / _ARRAYS, args=args)
    return {leaf.path: np.asarray(arrays[leaf.stored]) for leaf in leaves}


def _store() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


def _put(place: Place, array: np.ndarray, leaf: Leaf) -> Any:
    if leaf.key is not None:
        return jax.device_put(
            jax.random.wrap_key_data(jnp.asarray(array), impl=leaf.key), place.leaf.sharding
        )
    if array.shape != np.shape(place.leaf):
        padded = np.zeros(np.shape(place.leaf), array.dtype)
        padded[tuple(map(slice, array.shape))] = array
        array = padded
    if isinstance(place.leaf, np.ndarray):
        return array
    return jax.device_put(array, place.leaf.sharding)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the array store's way to say errno
    return os.strerror(int(code[1])) if code else str(error).strip().split("\n")[0][:200]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
