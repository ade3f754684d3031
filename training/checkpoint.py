"""Checkpoints: saved while training goes on, checked on disk, restored on any mesh.

A step is a folder with the arrays, written by Orbax, and a manifest with their checksums, written
after them:

    checkpoints/300/arrays/...        one array for each leaf of the state, without padding
    checkpoints/300/manifest.json     names, shapes, dtypes, checksums
    checkpoints/400.partial/          a step that is being written

A step gets its final name only after it has been read back and found right. Only then are older
steps removed.
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
_PARTIAL = ".partial"  # suffix of a step that is not finished

_log = logging.getLogger(__name__)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs an error with the traceback of each of its threads, and then raises it anyway.
    return "orbax" not in pathlib.Path(record.pathname).parts


logging.getLogger("absl").addFilter(_is_not_from_orbax)


@dataclasses.dataclass(frozen=True)
class _LeafCopy:
    leaf: Leaf  # without its checksum, which the worker computes
    array: np.ndarray


class Checkpoints:
    """The checkpoints in one folder.

    `save` writes in the background. Errors there are returned, one line each, by the next `save`,
    `wait` or `close`. `skipped` has a line, with the reason, for each step that the last `restore`
    could not use.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3) -> None:
        """Opens a folder of checkpoints, which need not exist yet.

        Args:
          directory: holds the steps and nothing else.
          keep: how many steps to keep: the newest ones.

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

    def __exit__(self, *exception: object) -> None:
        for trouble in self.close():
            _log.warning(trouble)

    def steps(self) -> list[int]:
        """The finished steps, oldest first; only `restore` checks whether they are damaged."""
        return [step for step in self._step_folders() if (self._folder(step) / _MANIFEST).exists()]

    def empty(self) -> bool:
        """Whether nothing was ever saved here."""
        return not self._step_folders()

    def check_writable(self, state: Any = None) -> None:
        """Raises if checkpoints cannot be written here; call it before the first step of training.

        Args:
          state: the state to be saved, or its shapes; None: the free space is not checked.

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
        """Copies `state`, and writes the copy in the background; `state` may then be donated.

        It first waits for the save before it, so memory holds one copy at most.

        Args:
          step: names the checkpoint. A checkpoint of the same step is replaced; those of later
            steps are removed, since a resumed run no longer leads to them.
          state: a pytree of arrays, in any layout over the devices of this process.
          extra: saved beside the state, as JSON.
          logical_shapes: a tree of the same structure with the shapes without padding, which is not
            saved; None: nothing is padded.
          wait: return only after the checkpoint is written.

        Returns:
          A line for each error in the background since the last call that returned them.

        Raises:
          ValueError: `extra` is not JSON, a logical shape does not fit, or a leaf lies on devices
            of other processes.
        """
        Manifest(step=step, leaves=(), extra=extra).to_json()  # raises here, not in the worker
        self._finish_save()
        places = manifest.places(state, logical_shapes)
        copies = [_copy(number, place) for number, place in enumerate(places)]
        self._saving = self._worker.submit(self._save, step, copies, extra)
        return self.wait() if wait else self._take_troubles()

    def wait(self) -> list[str]:
        """Waits for the save in the background; returns its errors, as `save` does."""
        self._finish_save()
        return self._take_troubles()

    def close(self) -> list[str]:
        """Waits for the save in the background; returns its errors. It is the last call."""
        troubles = self.wait()
        self._worker.shutdown()
        return troubles

    def restore(
        self, template: Any, step: int | None = None, *, logical_shapes: Any = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """The newest checkpoint that is undamaged and fits: its step, its state and its extra.

        The checksum of every leaf is compared. `skipped` then names the steps passed over.

        Args:
          template: a pytree of `ShapeDtypeStruct`s (or arrays) with the shardings that the restored
            leaves are to have, on any mesh.
          step: restore this step only; None: the newest that can be restored.
          logical_shapes: as for `save`; the template's padding is filled with zeros.

        Raises:
          FileNotFoundError: there is no checkpoint, or none of `step`.
          ValueError: no checkpoint is undamaged and fits `template`; each is named with the reason.
        """
        self._finish_save()
        wanted = manifest.places(template, logical_shapes)
        steps = self._step_folders()
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"{self.directory} has no checkpoint of step {step}, it has {steps}"
            )
        if not steps:
            raise FileNotFoundError(
                f"{self.directory} holds no checkpoint; leave --resume out to start anew"
            )
        self.skipped = []
        for candidate in reversed(steps if step is None else [step]):
            try:
                saved, arrays = _read(self._folder(candidate), wanted)
            except ValueError as error:
                self.skipped.append(f"step {candidate}: {error}")
                continue
            by_path = {leaf.path: leaf for leaf in saved.leaves}
            leaves = [_put(place, arrays[place.path], by_path[place.path]) for place in wanted]
            return candidate, jax.tree.unflatten(jax.tree.structure(template), leaves), saved.extra
        raise ValueError(
            f"no checkpoint in {self.directory} can be restored: " + "; ".join(self.skipped)
        )

    def _finish_save(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _take_troubles(self) -> list[str]:
        troubles, self._troubles = self._troubles, []
        return troubles

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _step_folders(self) -> list[int]:
        names = [path.name for path in self.directory.glob("*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _save(self, step: int, copies: list[_LeafCopy], extra: dict[str, Any]) -> None:
        partial = self.directory / f"{step}{_PARTIAL}"
        try:
            leaves = [
                dataclasses.replace(copy.leaf, sha256=manifest.checksum(copy.array))
                for copy in copies
            ]
            written = Manifest(step=step, leaves=tuple(leaves), extra=extra)
            if not _is_saved(self._folder(step), written):
                shutil.rmtree(partial, ignore_errors=True)
                _write(partial, written, copies)
                if self._folder(step).exists():
                    shutil.rmtree(self._folder(step))
                partial.rename(self._folder(step))
        except Exception as error:  # a failed save never ends training
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
        # Steps after `newest` are from before this run was resumed; it no longer leads to them.
        to_keep = [step for step in finished if step <= newest][-self.keep :]
        for step in finished:
            if step not in to_keep:
                shutil.rmtree(self._folder(step))
        for partial in self.directory.glob(f"*{_PARTIAL}"):  # left by a process that was killed
            shutil.rmtree(partial)

    def _trouble(self, step: int, copies: list[_LeafCopy], error: Exception) -> str:
        size = sum(copy.array.nbytes for copy in copies)
        free = shutil.disk_usage(self.directory).free if self.directory.exists() else 0
        room = f"it needs {_megabytes(size)}, {_megabytes(free)} are free"
        good = [good for good in self.steps() if good != step]
        return (
            f"the checkpoint of step {step} was not written to {self.directory}: {_reason(error)}; "
            f"{room}; the last good one is {f'step {good[-1]}' if good else 'none'}"
        )


def _copy(number: int, place: Place) -> _LeafCopy:
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
        return _LeafCopy(described, np.array(jax.random.key_data(leaf)))
    if not isinstance(leaf, jax.Array):
        return _LeafCopy(described, np.array(leaf[tuple(map(slice, place.shape))]))
    if not leaf.is_fully_addressable:
        raise ValueError(
            f"{place.path} lies on devices of several processes; gather it to each process first"
        )
    # Shard by shard into fresh memory. A view of the buffer, or the host copy that jax caches for
    # an array, would keep the next step from donating that buffer.
    array = np.empty(place.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            part = array[(*shard.index, ...)]  # `...` makes it a view even of a scalar
            part[...] = np.asarray(shard.data)[tuple(map(slice, part.shape))]
    return _LeafCopy(described, array)


def _is_saved(folder: pathlib.Path, written: Manifest) -> bool:
    try:
        if (folder / _MANIFEST).read_text() != written.to_json():
            return False
        _load(folder, written.leaves)
    except (OSError, ValueError):
        return False
    return True


def _write(folder: pathlib.Path, written: Manifest, copies: list[_LeafCopy]) -> None:
    """Writes a whole step to `folder`, and reads it back to check it."""
    folder.mkdir(parents=True)
    with _store() as store:
        arrays = {copy.leaf.stored: copy.array for copy in copies if copy.array.size}
        store.save(folder / _ARRAYS, args=ocp.args.PyTreeSave(arrays))
    with (folder / _MANIFEST).open("w") as file:
        file.write(written.to_json())
        file.flush()
        os.fsync(file.fileno())
    _load(folder, written.leaves)


def _read(folder: pathlib.Path, wanted: Sequence[Place]) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The manifest and the arrays by path of a step's folder; ValueError: it cannot be used."""
    try:
        text = (folder / _MANIFEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"its {_MANIFEST} cannot be read ({_reason(error)}): saving was cut short, or another "
            "program wrote it"
        ) from None
    saved = Manifest.from_json(text)
    if str(saved.step) != folder.name:
        raise ValueError(f"its manifest is that of step {saved.step}")
    leaves = manifest.rename_old_leaves(saved.leaves, wanted)
    saved = dataclasses.replace(saved, leaves=tuple(leaves))
    differing = manifest.mismatches(leaves, wanted)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError("it is of another state: " + "; ".join(differing[:3]) + more)
    return saved, _load(folder, saved.leaves)


def _load(folder: pathlib.Path, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    """The arrays of `leaves` by path; ValueError: one is damaged, and is named."""
    stored = [leaf for leaf in leaves if 0 not in leaf.shape]  # the store takes no empty arrays
    try:
        arrays = _fetch(folder, stored)
    except Exception:  # few kinds of error name the array, so read one at a time
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
    # Without OCDBT, which packs arrays into shared files, each array has files of its own: damage
    # then stays with one leaf, which `_load` can name.
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
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the array store's form of errno
    return os.strerror(int(code[1])) if code else str(error).strip().split("\n")[0][:200]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
