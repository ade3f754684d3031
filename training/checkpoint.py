"""Checkpoints: saved while training goes on, checked on disk, restored on any mesh.

A step is a folder with the arrays, and a manifest with their checksums, written after them:

    checkpoints/300/arrays/...        one array for each leaf of the state, without padding
    checkpoints/300/manifest.json     names, shapes, dtypes, checksums
    checkpoints/400.partial/          a step that is being written or removed

A step gets its final name only after it has been read back and found right. Only then are older
steps removed, unless the disk is full: then the oldest gives way, but never the last good one.
"""

import dataclasses
import errno
import logging
import os
import pathlib
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training import manifest, step_folder
from training.arrays import write_arrays
from training.manifest import Leaf, Manifest, Place
from training.run_folder import MANIFEST, PARTIAL, finished_steps, step_folders

_FULL = {errno.ENOSPC, errno.EDQUOT}

_log = logging.getLogger(__name__)


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
        return finished_steps(self.directory)

    def last_good(self) -> int | None:
        """The newest step that is undamaged, which is read to know it; None: there is none."""
        return next((step for step in reversed(self.steps()) if self._is_good(step)), None)

    def empty(self) -> bool:
        """Whether nothing was ever saved here."""
        return not step_folders(self.directory)

    def clean(self) -> list[str]:
        """Removes what killed processes left; a line for each thing removed, or found odd.

        Only one process at a time may train here: what another is writing would be removed.
        """
        lines = []
        for partial in sorted(self.directory.glob(f"*{PARTIAL}")):
            size = _megabytes(step_folder.size_of(partial))
            step_folder.remove(partial)
            lines.append(f"removed {partial.name}, whose saving or removal was cut short ({size})")
        finished = self.steps()
        for step in step_folders(self.directory):
            # `restore` names a newer one.
            if step not in finished and step < max(finished, default=0):
                lines.append(
                    f"step {step} has no {MANIFEST}: it is damaged, or another program's; left as "
                    f"it is, remove {self._folder(step)} if nobody needs it"
                )
        return lines

    def check_writable(self, state: Any = None) -> None:
        """Raises if checkpoints cannot be written here; call it before the first step of training.

        A new checkpoint is whole before the oldest one goes, so there must be room for `keep` + 1.

        Args:
          state: the state to be saved, or its shapes; None: the free space is not checked.

        Raises:
          OSError: the folder cannot be written, or the disk has too little room.
        """
        probe = self.directory / f"writable{PARTIAL}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if probe.exists():
                step_folder.remove(probe)
            # By the array store, which takes fewer names of folders than the system.
            write_arrays(probe, {"probe": np.zeros(1)})
            step_folder.remove(probe)
        except Exception as error:  # the system's, or the array store's
            raise OSError(
                f"checkpoints cannot be written to {self.directory} "
                f"({step_folder.reason(error)}); mend that or choose another --out"
            ) from error
        size = sum(place.nbytes for place in manifest.places(state))
        wanted = self.keep + 1 - min(len(self.steps()), self.keep)
        free = shutil.disk_usage(self.directory).free
        cut_short = self.directory.glob(f"*{PARTIAL}")  # which `clean` removes
        free += sum(map(step_folder.size_of, cut_short))
        if free < wanted * size:
            raise OSError(
                f"keep={self.keep} needs room for {self.keep + 1} checkpoints, "
                f"{_megabytes(wanted * size)} more than they take now, but {self.directory} has "
                f"{_megabytes(free)} free; make room, lower --keep or choose another --out"
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
        steps = step_folders(self.directory)
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
                saved, arrays = step_folder.read(self._folder(candidate), wanted)
            except ValueError as error:
                self.skipped.append(f"step {candidate}: {error}")
                continue
            by_path = {leaf.path: leaf for leaf in saved.leaves}
            leaves = [_put(place, arrays[place.path], by_path[place.path]) for place in wanted]
            return candidate, jax.tree.unflatten(jax.tree.structure(template), leaves), saved.extra
        raise ValueError(
            f"no checkpoint in {self.directory} can be restored: {'; '.join(self.skipped)}; start "
            "anew, in another folder"
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

    def _save(self, step: int, copies: list[_LeafCopy], extra: dict[str, Any]) -> None:
        partial = self.directory / f"{step}{PARTIAL}"
        try:
            leaves = [
                dataclasses.replace(copy.leaf, sha256=manifest.checksum(copy.array))
                for copy in copies
            ]
            written = Manifest(step=step, leaves=tuple(leaves), extra=extra)
            if not step_folder.is_saved(self._folder(step), written):
                self._write(partial, written, copies)
                if self._folder(step).exists():
                    step_folder.remove(self._folder(step))
                partial.rename(self._folder(step))
        except Exception as error:  # a failed save never ends training
            self._troubles.append(self._trouble(step, copies, error))
            return
        try:
            self._prune(step)
        except OSError as error:
            why = step_folder.reason(error)
            self._troubles.append(f"an old checkpoint in {self.directory} cannot be removed: {why}")

    def _write(self, partial: pathlib.Path, written: Manifest, copies: list[_LeafCopy]) -> None:
        """Writes a step; while the disk is full, the oldest step gives way."""
        while True:
            try:
                # Not its parents: if the run folder is gone, it must not come back.
                self.directory.mkdir(exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                arrays = {copy.leaf.stored: copy.array for copy in copies}
                step_folder.write(partial, written, arrays)
                return
            except Exception as error:
                shutil.rmtree(partial, ignore_errors=True)
                if step_folder.error_number(error) not in _FULL or not self._give_way(written.step):
                    raise

    def _give_way(self, to: int) -> bool:
        """Removes the oldest step that is not the last good one; returns whether there was one."""
        good = self.last_good()
        others = [step for step in self.steps() if step != good]
        if not others:
            return False
        step_folder.remove(self._folder(others[0]))
        self._troubles.append(f"the disk is full: step {others[0]} gave way to step {to}")
        return True

    def _is_good(self, step: int) -> bool:
        try:
            saved = Manifest.read(self._folder(step))
            step_folder.load(self._folder(step), saved.leaves)
        except (OSError, ValueError):
            return False
        return True

    def _prune(self, newest: int) -> None:
        finished = self.steps()
        # Steps after `newest` are from before this run was resumed; it no longer leads to them.
        to_keep = [step for step in finished if step <= newest][-self.keep :]
        for step in finished:
            if step not in to_keep:
                step_folder.remove(self._folder(step))
        for partial in self.directory.glob(f"*{PARTIAL}"):  # left by a process that was killed
            step_folder.remove(partial)

    def _trouble(self, step: int, copies: list[_LeafCopy], error: Exception) -> str:
        size = sum(copy.array.nbytes for copy in copies)
        free = shutil.disk_usage(self.directory).free if self.directory.exists() else 0
        room = f"it needs {_megabytes(size)}, {_megabytes(free)} are free"
        good = self.last_good()
        return (
            f"the checkpoint of step {step} was not written to {self.directory}: "
            f"{step_folder.reason(error)}; "
            f"{room}; the last good one is {'none' if good is None else f'step {good}'}"
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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
