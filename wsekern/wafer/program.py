"""The jitted program of a kernel, compiled once for equal kernels.

A partial or a lambda that is made anew at each call is another object. It is the same program if
its code and all that it holds are the same.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from wsekern.wafer import host_memory, on_devices, virtual
from wsekern.wafer.absent import never_runs
from wsekern.wafer.specs import Specs, broadcast_specs, check_divides

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer


def mapped_program(
    wafer: "Wafer",
    kernel: Callable,
    specs: Specs,
    replicated_by_construction: bool,
    donate: tuple[int, ...] = (),
    by_xla: bool = False,
) -> Callable:
    """The jitted program of `kernel`, made once for equal kernels, wafers and specs.

    Args:
      by_xla: whether `kernel` is a function of whole arrays, which XLA splits between devices.
    """
    if wafer.backend != "devices" and (wafer.placement or wafer.corner != (0, 0)):
        # Where PEs lie on the physical wafer changes no result, and so no program.
        wafer = dataclasses.replace(wafer, placement=None, corner=(0, 0))
    key = program_key(kernel)
    if key is None:
        return _Program(wafer, kernel, specs, replicated_by_construction, donate, by_xla)
    keyed = _Keyed(key, freeze(kernel))
    return _kept_program(keyed, wafer, specs, replicated_by_construction, donate, by_xla)


def local_program(kernel: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """`kernel`, which communicates with no other PE, jitted once for equal kernels."""
    key = program_key(kernel)
    if key is None:
        return jax.jit(kernel, donate_argnums=donate_argnums)
    return _kept_local(_Keyed(key, freeze(kernel)), donate_argnums)


def program_key(kernel: Callable) -> Hashable | None:
    """A key that is equal for kernels that are the same program; None if that is unknown."""
    try:
        return _key(kernel, ())
    except _NoKey:
        return None


def freeze(kernel: Callable) -> Callable:
    """A copy of `kernel` with the values that its closure holds now."""
    if isinstance(kernel, functools.partial):
        return functools.partial(freeze(kernel.func), *kernel.args, **kernel.keywords)
    if not isinstance(kernel, types.FunctionType) or not kernel.__closure__:
        return kernel
    cells = tuple(types.CellType(_frozen_value(cell)) for cell in kernel.__closure__)
    copy = types.FunctionType(
        kernel.__code__, kernel.__globals__, kernel.__name__, kernel.__defaults__, cells
    )
    copy.__kwdefaults__ = kernel.__kwdefaults__
    return functools.update_wrapper(copy, kernel)


class _Program:
    """A kernel over whole arrays: checks its operands, then calls one jitted function."""

    def __init__(
        self,
        wafer: "Wafer",
        kernel: Callable,
        specs: Specs,
        replicated_by_construction: bool,
        donate: tuple[int, ...],
        by_xla: bool,
    ) -> None:
        self.wafer = wafer
        self.specs = specs
        virtual_pes = wafer.backend == "virtual"
        run = virtual.map_on_virtual_pes if virtual_pes else on_devices.map_on_devices
        if by_xla:
            whole = on_devices.leave_to_xla(wafer, kernel, specs)
        else:
            whole = run(wafer, kernel, specs, not replicated_by_construction)
        self.call = jax.jit(whole, donate_argnums=donate)
        self.needs: dict[Hashable, int] = {}  # bytes beside the operands, by their shapes

    def __call__(self, *operands: Any) -> Any:
        specs = broadcast_specs(self.specs.in_specs, operands, "in_specs")
        leaves = jax.tree.leaves(operands)
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        if not is_traced and self.wafer.compile_only:
            raise never_runs(self.wafer, "Wafer.map")
        for operand, spec in zip(leaves, specs, strict=True):
            check_divides(self.wafer, "Wafer.map", operand, spec)
            on_devices.check_placed(self.wafer, operand)
        shares_memory = self.wafer.backend == "virtual" and _in_one_memory(self.wafer)
        if shares_memory and not is_traced:
            kinds = ((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
            key = jax.tree.structure(operands), *kinds
            if key not in self.needs:
                results = jax.eval_shape(self.call, *operands)
                self.needs[key] = self._bytes_needed(operands, results)
            if self.needs[key]:
                host_memory.check_room(self.wafer, self.needs[key], operands)
        try:
            results = self.call(*operands)
        except jax.errors.JaxRuntimeError:
            if self.wafer.backend != "abstract":
                raise
            raise never_runs(self.wafer, "Wafer.map") from None
        if shares_memory and is_traced:  # no memory is taken yet
            host_memory.check_traced(self.wafer, operands, results)
        return results

    def _bytes_needed(self, operands: Any, results: Any) -> int:
        devices = 1 if self.wafer.mesh is None else self.wafer.device_mesh.size
        return host_memory.bytes_needed(self.call, operands, results, devices)


def _in_one_memory(wafer: "Wafer") -> bool:
    """Whether all PEs share one memory, as on emulated devices.

    On several memories no check is needed: XLA's own error names the device that is full.
    """
    return wafer.mesh is None or wafer.platform == "cpu"


@dataclasses.dataclass(frozen=True)
class _Keyed:
    key: Hashable
    kernel: Callable = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4096)
def _kept_program(
    keyed: _Keyed,
    wafer: "Wafer",
    specs: Specs,
    replicated_by_construction: bool,
    donate: tuple[int, ...],
    by_xla: bool,
) -> _Program:
    return _Program(wafer, keyed.kernel, specs, replicated_by_construction, donate, by_xla)


@functools.lru_cache(maxsize=1024)
def _kept_local(keyed: _Keyed, donate_argnums: tuple[int, ...]) -> Callable:
    return jax.jit(keyed.kernel, donate_argnums=donate_argnums)


class _NoKey(Exception):
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another one that holds the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(value: Any, above: tuple[Any, ...]) -> Hashable:
    """The key of a function or of a value in it; `above` is what holds it, outermost first."""
    if any(value is one for one in above):
        raise _NoKey  # a function that holds itself
    above = (*above, value)
    if isinstance(value, functools.partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return (*(_key(p, above) for p in parts), tuple(value.keywords), len(value.args))
    if isinstance(value, types.FunctionType):
        values = [_cell_value(cell) for cell in value.__closure__ or ()]
        values += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        keys = tuple(_key(v, above) for v in values)
        # The very code object, not an equal one: if its module was reloaded, an equal one may use
        # other globals.
        return _Same(value.__code__), keys, _key_of_globals(value, above)
    if isinstance(value, tuple):
        return type(value), tuple(_key(item, above) for item in value)
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 == -0.0, yet they are different programs
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = tuple(_key(getattr(value, f.name), above) for f in dataclasses.fields(value))
        return type(value), _hashable(value) and fields
    return type(value), _hashable(value)  # 1 == 1.0 == True, likewise


def _key_of_globals(function: types.FunctionType, above: tuple[Any, ...]) -> Hashable:
    # In a script or a notebook, a global may be redefined while the code that uses it stays.
    names = function.__globals__
    if names.get("__name__") != "__main__":
        return ()
    used = [name for name in _names_in(function.__code__) if name in names]
    return tuple(_key_or_object(names[name], above) for name in used)


def _key_or_object(value: Any, above: tuple[Any, ...]) -> Hashable:
    try:
        return _key(value, above)
    except _NoKey:
        return _Same(value)


def _names_in(code: types.CodeType) -> list[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names_in(c))]


def _cell_value(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise _NoKey from None  # a name that is bound later


def _frozen_value(cell: types.CellType) -> Any:
    value = cell.cell_contents
    return freeze(value) if isinstance(value, types.FunctionType | functools.partial) else value


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise _NoKey from None
    return value
