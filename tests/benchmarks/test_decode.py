"""The candidates that decode is timed against compute the same."""

import numpy as np
import pytest

import wsekern as wk
from benchmarks import decode

OPTIONS = decode.DecodeOptions(batch=2, heads=4, kv_heads=2, head_size=8)


@pytest.mark.parametrize("by_head", [False, True], ids=["of jax.nn", "by head"])
def test_the_peer_attends_as_we_do(by_head):
    for wafer in (None, wk.Wafer.devices(2, 2)):
        ours = decode._ours(wafer, 3, 16, OPTIONS)
        peer = decode._peer(wafer, 3, 16, OPTIONS, by_head)
        for _ in range(2):  # the cache of the step before is the next one's
            np.testing.assert_allclose(ours(), peer(), atol=1e-6)
