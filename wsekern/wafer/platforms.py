"""Which platform a program is compiled for, also where its chips are not there."""

import functools
import importlib.util
import pkgutil
import sys
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding

from wsekern.wafer import context

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

Platform = str | None  # "cpu", "gpu" or "tpu"; None on an abstract wafer

# The package of a platform's compiler, and how the module in it begins.
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
        return own, *(p for p in _COMPILERS if p != own and _is_installed(_COMPILERS[p]))
    return (own,)


def traced_platform() -> Platform:
    """The platform of the wafer whose kernel is being traced, else of the current wafer.

    Its chips need not be there, and then JAX's own platform is another. Without a wafer it is
    JAX's own.
    """
    wafer = context.inside() or context.current()
    return jax.default_backend() if wafer is None else wafer.platform


@functools.cache
def _is_installed(compiler: str) -> bool:
    package, _, module = compiler.partition(".")
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # of a module that somebody made by hand
        return package in sys.modules
    if found is None or not module:
        return found is not None
    return any(
        one.name.startswith(module)
        for one in pkgutil.iter_modules(found.submodule_search_locations)
    )


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
