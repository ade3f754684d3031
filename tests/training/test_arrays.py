"""Arrays on disk: each dtype comes back, failures leave nothing at work, damage takes no memory."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from training.arrays import read_array, write_arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 4)])
def test_an_array_comes_back_to_the_bit(shape, dtype, tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, shape)
    array = np.asarray(bits).astype(jnp.dtype(dtype))
    write_arrays(tmp_path / "arrays", {"0000.a": array})
    got = read_array(tmp_path / "arrays", "0000.a", shape, dtype)
    assert (got.shape, got.dtype) == (array.shape, array.dtype)
    assert got.tobytes() == array.tobytes()


def test_what_fails_while_other_arrays_are_written_leaves_nothing(tmp_path):
    """Of 40 arrays, 20 cannot be written; the others are not written behind our back."""
    good = {f"a{i}": np.ones((64, 64)) for i in range(20)}
    bad = {f"{'long' * 80}{i}": np.ones((64, 64)) for i in range(20)}
    for _ in range(5):
        with pytest.raises(Exception, match="File name too long"):
            write_arrays(tmp_path / "arrays", bad | good)
        shutil.rmtree(tmp_path / "arrays", ignore_errors=True)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [10**9, 10**6]}, r"it is float32\[1000000000, 1000000\], not float32\[2, 3\]"),
        ({"dtype": "<f8"}, r"it is float64\[2, 3\], not float32\[2, 3\]"),
        (
            {"chunks": [10**6, 10**6]},
            r"its chunks of \[1000000, 1000000\] are larger than \[2, 3\]",
        ),
    ],
)
def test_a_description_that_was_changed_is_refused_before_memory_is_taken(
    changes, message, tmp_path
):
    write_arrays(tmp_path, {"a": np.ones((2, 3), np.float32)})
    path = tmp_path / "a" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_array(tmp_path, "a", (2, 3), "float32")
