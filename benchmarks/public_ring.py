"""The ring attention of the PyPI package `ringattention`: a peer for `attention`.

H. Liu, M. Zaharia and P. Abbeel, 2023. It is timed if it is installed:
`pip install -e '.[bench]' -c constraints.txt`.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

_CHUNK = 512  # rows of queries, and of keys, in one turn of its inner loop


def find(wafer: Any, causal: bool) -> Callable | None:
    """Its attention of `[B, T, N, H]` arrays on a wafer of devices; None if not installed.

    Args:
      wafer: the sequence is split along y, the heads along x.
      causal: whether a token sees only the tokens before it.
    """
    if any(importlib.util.find_spec(name) is None for name in ("ringattention", "einops")):
        return None
    import jax
    from jax.sharding import PartitionSpec as P

    ring_attention = _load().ring_attention

    def per_pe(q, k, v):
        rows = min(_CHUNK, q.shape[1])
        options = {
            "causal_block_size": 1 if causal else None,
            "query_chunk_size": rows,
            "key_chunk_size": rows,
            "deterministic": True,
            "dropout_rng": None,
            "attn_pdrop": 0.0,
            "dtype": q.dtype,
            "policy": jax.checkpoint_policies.nothing_saveable,
            "precision": None,
            "prevent_cse": False,
        }
        return ring_attention(q, k, v, None, None, None, "y", True, options)

    spec = P(None, "y", "x", None)
    return jax.shard_map(
        per_pe, mesh=wafer.device_mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )


@functools.cache
def _load() -> Any:
    # The package's __init__ imports names that newer versions of jax lack; this module does not.
    package = importlib.util.find_spec("ringattention")
    assert package is not None and package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/ringattention_jax.py"
    spec = importlib.util.spec_from_file_location("ringattention_jax", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
