"""Which platform a program is compiled for, also where its chips are not there."""

import sys
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding

from wsekern.wafer import context

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

Platform = str | None  # "cpu", "gpu" or "tpu"; None on an abstract wafer

# What Python imports of a platform's compiler, where it is installed.
_COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda"}


def platforms_of(wafer: "Wafer | None", array: Any) -> tuple[Platform, ...]:
    """The platform that a program of `array` runs on; all that it may be, where JAX does not tell.

    Args:
      wafer: where it runs, if it was said; by default the current wafer.
      array: an operand, traced or not, or its `jax.ShapeDtypeStruct`.
    """
    wafer = context.current() if wafer is None else wafer
    if wafer is not None:
        return (wafer.platform,)
    known = _platform_of_array(array)
    if known is not None:
        return (known,)
    # A program for chips that are not there is traced on this process's own platform. The type of
    # an operand on a single device does not name it, so only lowering knows. Only who imports this
    # module has such chips; everyone else is spared the tracing for them.
    own = jax.default_backend()
    if "jax.experimental.topologies" in sys.modules and isinstance(array, jax.core.Tracer):
        return own, *(p for p in _COMPILERS if p != own and _is_imported(_COMPILERS[p]))
    return (own,)


def traced_platform() -> Platform:
    """The platform of the wafer whose kernel is being traced, else of the current wafer.

    Its chips need not be there, and then JAX's own platform is another. Without a wafer it is
    JAX's own.
    """
    wafer = context.inside() or context.current()
    return jax.default_backend() if wafer is None else wafer.platform


def _is_imported(module: str) -> bool:
    return any(name.startswith(module) for name in list(sys.modules))


def _platform_of_array(array: Any) -> Platform:
    if isinstance(array, jax.core.Tracer):
        sharding = getattr(jax.typeof(array), "sharding", None)
        device = getattr(getattr(sharding, "mesh", None), "abstract_device", None)
        kind = "" if device is None else device.device_kind
        return getattr(device, "platform", None) or _platform_of_kind(kind)
    sharding = getattr(array, "sharding", None)
    if sharding is None or (
        isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, jax.sharding.Mesh)
    ):
        return None
    return next(iter(sharding.device_set)).platform


def _platform_of_kind(kind: str) -> Platform:
    words = {"TPU": "tpu", "NVIDIA": "gpu", "cpu": "cpu"}
    return next((platform for word, platform in words.items() if word in kind), None)
