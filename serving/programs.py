"""The compiled programs of an engine: one for each shape of a step, kept on disk.

A second start with the same model, machine and versions loads the executables: it neither traces
nor compiles.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Array, Shaped

import wsekern as wk
from models.decoder import Decoder
from serving.sampler import Chosen, Extras, Rows, no_extras
from serving.steps import Batch, State, run_step
from wsekern.atomic_write import atomic_write
from wsekern.wafer.wafer import Wafer

# By default XLA widens or copies all weights of a layer before it multiplies by one of them. One
# after another, they take a third of the memory, and steps of 8 tokens up to a third less time.
_IN_TURN: dict[str, str | bool] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_FLOORS = ("wsekern", "sharding", "models", "serving")


class Shape(NamedTuple):
    """Of a step: T tokens of each of B sequences."""

    B: int
    T: int
    every: bool = False  # whether each token has one that follows, to verify guesses

    @property
    def rows(self) -> int:
        """Rows of which tokens are chosen."""
        return self.B * self.T if self.every else self.B


class DeviceSizes(NamedTuple):
    """Of what lies on the device."""

    pages: int
    page_tokens: int
    slots: int
    columns: int  # of a page table
    vocab: int  # tokens of the tokenizer


class Programs:
    """The programs of one model, and the arrays that pass from step to step."""

    def __init__(
        self,
        model: Decoder,
        sizes: DeviceSizes,
        *,
        kv_dtype: jax.typing.DTypeLike,
        wafer: Wafer | None,
        folder: pathlib.Path | None,
    ) -> None:
        """No program is compiled yet; `prepare` does that.

        Args:
          model: with stacked layers.
          sizes: of the cache and of a step.
          kv_dtype: of keys and values in the cache.
          wafer: where the model lies.
          folder: where executables are kept; None: nowhere.
        """
        self.sizes, self.wafer = sizes, wafer
        config = model.config
        self._graph, params = nnx.split(model)
        self._params, self._params_tree = jax.tree.flatten(params)
        self.vocab = config.vocab
        self._least_rows = 1
        self.folder = folder
        self._programs: dict[Shape, Any] = {}
        self._no_extras: dict[int, Extras] = {}
        empty = functools.partial(
            wk.KVPages.empty,
            layers=config.layers,
            pages=sizes.pages,
            page_tokens=sizes.page_tokens,
            kv_heads=config.kv_heads,
            head_size=config.d_head,
            heads=config.heads,
            dtype=kv_dtype,
            wafer=wafer,
        )
        with self._entered():
            if self._is_one_cpu:
                self._cache = jax.tree.map(_zeros, jax.eval_shape(empty))
            else:
                self._cache = empty()
        self._arrays = self._first_arrays()
        self.compiled = self.loaded = 0  # programs so far

    @property
    def bytes_of_cache(self) -> int:
        """Bytes of keys and values, on all devices."""
        return sum(array.nbytes for array in self._arrays[:-2])

    @property
    def least_rows(self) -> int:
        """Rows of the head's product, at least; another number takes other programs."""
        return self._least_rows

    @least_rows.setter
    def least_rows(self, rows: int) -> None:
        if rows != self._least_rows:
            self._programs.clear()
        self._least_rows = rows

    def prepare(self, shape: Shape) -> None:
        """Loads the program of a shape, or compiles and keeps it."""
        if shape in self._programs:
            return
        name = f"{shape.B}x{shape.T}{'-every' if shape.every else ''}-{self.least_rows}"
        file = self.file(f"{name}.xla")
        program = _load(file, self._trees(shape), self._devices) if file is not None else None
        if program is not None:
            self.loaded += 1
        else:
            # Not through JAX's own cache of programs: what that has loaded cannot be written again.
            with self._entered(), _without_compilation_cache(file is not None):
                function = functools.partial(
                    self._step, every=shape.every, least_rows=self.least_rows
                )
                jitted = jax.jit(function, donate_argnums=1)
                program = jitted.lower(*self._arguments(shape)).compile(
                    _IN_TURN if self._is_one_cpu else None
                )
            self.compiled += 1
            if file is not None:
                _keep(file, program)
        self._programs[shape] = program

    def file(self, name: str) -> pathlib.Path | None:
        """Where something is kept that depends on model, machine and versions; None: nowhere."""
        return None if self.folder is None else self.folder / self._key / name

    def forget(self, shape: Shape) -> None:
        """Drops the program of a shape from memory."""
        self._programs.pop(shape, None)

    def run(self, shape: Shape, batch: Batch, rows: Rows, extras: Extras | None = None) -> Chosen:
        """Launches one step; the tokens are there when it is done."""
        extras = self._extras_for(shape.rows) if extras is None else extras
        with self._entered():
            self._arrays, chosen = self._programs[shape](
                self._params, self._arrays, tuple(batch), tuple(rows), tuple(extras)
            )
        return Chosen(*chosen)

    def set_counts(self, slot: int, counts: np.ndarray) -> None:
        """Writes the counts of one slot's tokens, as `sampler.count_prompt` has them."""
        *others, all_counts = self._arrays
        self._arrays = (*others, _set_row(all_counts, slot, counts))

    def clear(self) -> None:
        """Empties the cache; all keys and values are 0."""
        self._arrays = tuple(map(_zeroed, self._arrays))

    def pages_of(self, page: int) -> tuple[np.ndarray, ...]:
        """One page in every layer, on the host: keys, values, and in int8 the scales of both."""
        rows = self._rows_of(page)
        return tuple(np.asarray(array[rows]) for array in self._arrays[:-2])

    def write_page(self, page: int, parts: Sequence[np.ndarray]) -> None:
        """Writes one page in every layer: `parts` are as `pages_of` gives them."""
        rows, arrays = self._rows_of(page), list(self._arrays)
        for index, part in enumerate(parts):
            placed = jax.device_put(part, arrays[index].sharding)
            with self._entered():
                arrays[index] = _set_rows(arrays[index], rows, placed)
        self._arrays = tuple(arrays)

    def _rows_of(self, page: int) -> np.ndarray:
        """The rows of the cache's arrays that hold one page."""
        return np.arange(self._cache.layers) * self.sizes.pages + page

    @functools.cached_property
    def page_key(self) -> str:
        """A hash of all that the numbers in a page depend on, every weight among it."""
        digest = hashlib.sha256(repr(self._numbers_parts()).encode())
        for array in self._arrays[:-2]:
            digest.update(f"{array.shape[1:]} {array.dtype.name}".encode())
        for leaf in self._params:
            # Off the CPU JAX would keep a copy on the host as long as the array lives.
            host = np.asarray(leaf if jax.default_backend() == "cpu" else jnp.copy(leaf))
            digest.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with self.wafer or contextlib.nullcontext():
            yield

    @property
    def _is_one_cpu(self) -> bool:
        return self.wafer is None and jax.default_backend() == "cpu"

    def _first_arrays(self) -> tuple[Shaped[Array, "..."], ...]:
        slots = self.sizes.slots + 1
        shapes = (slots,), (slots, self.vocab)
        last, counts = (_zeros(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in shapes)
        if self.wafer is not None:
            last, counts = (self.wafer.shard(x, jax.P()) for x in (last, counts))
        return *self._cache.arrays, last, counts

    def _step(
        self,
        params: list[Any],
        arrays: tuple[Any, ...],
        batch: tuple[Any, ...],
        rows: tuple[Any, ...],
        extras: tuple[Any, ...],
        *,
        every: bool,
        least_rows: int,
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        model = nnx.merge(self._graph, jax.tree.unflatten(self._params_tree, params))
        *pages, last, counts = arrays
        state = State(self._cache.with_arrays(tuple(pages)), last, counts)
        state, chosen = run_step(
            model,
            state,
            Batch(*batch),
            Rows(*rows),
            Extras(*extras),
            every=every,
            vocab=self.sizes.vocab,
            least_rows=least_rows,
        )
        return (*state.cache.arrays, state.last, state.counts), tuple(chosen)

    def _arguments(self, shape: Shape) -> tuple[Any, ...]:
        batch = Batch(
            tokens=np.zeros((shape.B, shape.T), np.int32),
            positions=np.zeros((shape.B, shape.T), np.int32),
            tables=np.zeros((shape.B, self.sizes.columns), np.int32),
            slots=np.zeros(shape.B, np.int32),
            chooses=np.array(False),
        )
        rows = empty_rows(shape.rows, self.vocab)
        extras = self._extras_for(shape.rows)
        return self._params, self._arrays, tuple(batch), tuple(rows), tuple(extras)

    def _trees(self, shape: Shape) -> tuple[Any, Any]:
        """The structures of a program's arguments and results."""
        arguments = jax.tree.structure((self._arguments(shape), {}))
        results = jax.tree.structure(((0,) * len(self._arrays), (0,) * len(Chosen._fields)))
        return arguments, results

    @property
    def _devices(self) -> list[jax.Device]:
        """The devices of a program, in its order."""
        if self.wafer is None or self.wafer.mesh is None:  # virtual PEs live on one device
            return sorted(self._arrays[0].devices(), key=lambda device: device.id)
        return list(self.wafer.device_mesh.devices.flat)

    @functools.cached_property
    def _key(self) -> str:
        """A name for all that an executable depends on."""
        parts = [*self._numbers_parts(), self.sizes]
        parts += [(leaf.shape, leaf.dtype.name, str(leaf.sharding)) for leaf in self._arrays]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _numbers_parts(self) -> list[Any]:
        """What numbers depend on besides those that come in: code, machine and model."""
        parts: list[Any] = [
            jax.__version__,
            jax.lib.__version__,
            _sources(),
            os.environ.get("XLA_FLAGS", ""),
        ]
        parts += [str(self._graph), str(self._params_tree), self.wafer, os.cpu_count()]
        parts += [(d.id, d.platform, d.device_kind) for d in self._devices]
        parts += [self._devices[0].client.platform_version]
        parts += [(leaf.shape, leaf.dtype.name, str(leaf.sharding)) for leaf in self._params]
        return parts

    def _extras_for(self, rows: int) -> Extras:
        if rows not in self._no_extras:
            extras = no_extras(rows, self.vocab)
            if self.wafer is None:
                extras = Extras(*map(jax.device_put, extras))
            else:
                wafer = self.wafer
                extras = Extras(*(wafer.shard(jnp.asarray(x), jax.P()) for x in extras))
            self._no_extras[rows] = extras
        return self._no_extras[rows]


def empty_rows(rows: int, vocab: int) -> Rows:
    """Rows that take the likeliest token, as NumPy arrays to be filled."""
    numbers = {name: np.zeros(rows, np.float32) for name in Rows._fields[3:10]}
    numbers |= {"top_k": np.full(rows, vocab, np.int32)}
    numbers |= {name: np.ones(rows, np.float32) for name in ("top_p", "repetition")}
    flags = {name: np.array(False) for name in Rows._fields[11:]}
    return Rows(
        slots=np.zeros(rows, np.int32),
        seeds=np.zeros((rows, 2), np.uint32),
        positions=np.zeros(rows, np.int32),
        forced=np.full(rows, -1, np.int32),
        **numbers,
        **flags,
    )


def _zeros(like: jax.ShapeDtypeStruct) -> Array:
    """Zeros from the host: on a CPU, one program that is compiled takes 40 MB of XLA's code."""
    return jax.device_put(np.zeros(like.shape, like.dtype), may_alias=False)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(counts: Array, slot: int, row: np.ndarray) -> Array:
    return counts.at[slot].set(row)


@functools.partial(jax.jit, donate_argnums=0)
def _set_rows(x: Array, rows: np.ndarray, values: Array) -> Array:
    return x.at[rows].set(values)


@functools.partial(jax.jit, donate_argnums=0)
def _zeroed(x: Array) -> Array:
    return jnp.zeros_like(x)


@functools.cache
def _sources() -> str:
    """A hash of the code that programs are made of."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for floor in _FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _without_compilation_cache(active: bool) -> Iterator[None]:
    if not active:
        yield
        return
    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009, mypy knows no such
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _load(file: pathlib.Path, trees: tuple[Any, Any], devices: list[jax.Device]) -> Any | None:
    """The program in a file; None if there is none that this machine can run."""
    try:
        payload = file.read_bytes()
    except OSError:
        return None
    try:
        return serialize_executable.deserialize_and_load(
            payload, *trees, backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # XLA's, pickle's: a damaged file is written anew
        return None


def _keep(file: pathlib.Path, program: Any) -> None:
    try:
        payload, _, _ = serialize_executable.serialize(program)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(payload)
    except (OSError, ValueError, TypeError, pickle.PickleError, jax.errors.JaxRuntimeError):
        pass  # it runs all the same, and is compiled again at the next start
