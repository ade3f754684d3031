"""This file is a kernel as the program of one PE alone, for operations without a wafer."""

import dataclasses
import functools
from collections.abc import Callable, Hashable

import jax

from wsekern import identity


def program_of(kernel: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """`kernel`, which meets no other PE, jitted; the same program for equal kernels."""
    key = identity.key(kernel)
    if key is None:
        return jax.jit(kernel, donate_argnums=donate_argnums)
    return _kept(_Keyed(key, identity.frozen(kernel)), donate_argnums)


@dataclasses.dataclass(frozen=True)
class _Keyed:
    key: Hashable
    kernel: Callable = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=1024)
def _kept(keyed: _Keyed, donate_argnums: tuple[int, ...]) -> Callable:
    return jax.jit(keyed.kernel, donate_argnums=donate_argnums)
