"""Checkpoints: exact on any mesh; damage, full disks and killed processes cost no good step."""

import errno
import json
import os
import resource
import shutil
import threading
import types
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from training import step_folder
from training.arrays import write_arrays
from training.checkpoint import Checkpoints

SPECS = {"w": P("y", "x"), "b": P("x"), "deep": {"n": P(), "half": P(None, "y")}}
GRIDS = [(2, 4), (4, 2), (1, 1)]


def shardings(height, width):
    wafer = wk.Wafer.devices(height, width)
    return jax.tree.map(wafer.sharding, SPECS, is_leaf=lambda leaf: isinstance(leaf, P))


def values(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((16, 32)).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
        "deep": {
            "n": np.int32(2**31 - 1 - seed),
            # every bfloat16 there is, NaN and -0 included
            "half": np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(64, -1),
        },
    }


def state(height=2, width=4, seed=0):
    return jax.device_put(values(seed), shardings(height, width))


def template(height=2, width=4):
    return jax.tree.map(
        lambda value, sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding),
        values(),
        shardings(height, width),
    )


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(got, want):
    def check(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(bits(a), bits(b))

    jax.tree.map(check, got, want)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 10, 20 and 30 in a folder."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state(seed=step), {"step": step})
        assert checkpoints.wait() == []
        yield checkpoints


@pytest.mark.parametrize("grid", GRIDS)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, grid):
    step, got, extra = saved.restore(template(*grid))
    assert (step, extra, saved.skipped) == (30, {"step": 30}, [])
    assert_same(got, values(30))
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings(*grid)), strict=True):
        assert leaf.sharding == sharding


def test_an_older_step_on_demand(saved):
    step, got, _ = saved.restore(template(), step=10)
    assert step == 10
    assert_same(got, values(10))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 15, it has \[10, 20, 30\]"):
        saved.restore(template(), step=15)


def test_keys_named_tuples_scalars_and_empty_arrays(tmp_path):
    Pair = namedtuple("Pair", "key count")
    before = [
        Pair(jax.random.key(7), jnp.uint32(2**32 - 1)),
        jax.random.split(jax.random.key(1, impl="rbg"), 3),
        jax.random.PRNGKey(3),
        jnp.zeros((0, 4)),
        np.arange(3.0),
    ]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, before, {}, wait=True) == []
        _, after, _ = checkpoints.restore(before)
    assert isinstance(after[0], Pair) and isinstance(after[4], np.ndarray)
    raw = lambda leaf: (  # noqa: E731
        jax.random.key_data(leaf)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
    )
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def test_a_checkpoint_whose_optimizer_has_its_old_name_is_restored(tmp_path):
    """Before version 0.2 the train state's "optimizer" was called "optimiser"."""
    moments = {"mu": jnp.arange(4.0), "count": jnp.int32(3)}
    old = {"params": {"optimiser": jnp.ones(2)}, "optimiser": moments}
    new = {"params": {"optimiser": jnp.ones(2)}, "optimizer": moments}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, old, {}, wait=True) == []
        step, got, _ = checkpoints.restore(new)
        assert step == 1
        assert_same(got, new)
        assert_same(checkpoints.restore(old)[1], old)
        with pytest.raises(ValueError, match="it lacks optimizer/nu; optimiser/count is not part"):
            checkpoints.restore({"optimizer": {"nu": jnp.ones(4)}})


def test_padding_is_not_saved_and_comes_back_as_zeros(tmp_path):
    logical = {"w": (7, 10), "n": ()}
    on_3x3 = {"w": jnp.full((9, 12), 5.0), "n": jnp.int32(1)}
    on_3x3["w"] = jax.device_put(on_3x3["w"], wk.Wafer.devices(3, 3).sharding(P("y", "x")))
    sharding = wk.Wafer.devices(2, 4).sharding(P("y", "x"))
    on_2x4 = {
        "w": jax.ShapeDtypeStruct((8, 12), "float32", sharding=sharding),
        "n": jax.ShapeDtypeStruct((), "int32"),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on_3x3, {}, logical_shapes=logical, wait=True)
        _, got, _ = checkpoints.restore(on_2x4, logical_shapes=logical)
        want = np.zeros((8, 12))
        want[:7, :10] = 5
        np.testing.assert_array_equal(got["w"], want)
        with pytest.raises(ValueError, match=r"w is float32\[7, 10\], wanted is float32\[8, 12\]"):
            checkpoints.restore(on_2x4)
        with pytest.raises(ValueError, match=r"w is \(9, 12\), which cannot hold \(10, 2\)"):
            checkpoints.save(2, on_3x3, {}, logical_shapes={"w": (10, 2), "n": ()})


def test_a_save_does_not_wait_for_the_disk_and_allows_donation(tmp_path, monkeypatch):
    disk = threading.Event()
    write = step_folder.write

    def slow(*arguments):
        assert disk.wait(60)
        write(*arguments)

    monkeypatch.setattr(step_folder, "write", slow)
    following = jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, first := state(), {}) == []
        after = following(first)
        assert first["w"].is_deleted() and not np.any(after["w"])
        assert checkpoints.steps() == []
        disk.set()
        assert checkpoints.wait() == []
        assert_same(checkpoints.restore(template())[1], values())


def test_only_the_newest_steps_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 5):
            checkpoints.save(step, {"a": jnp.ones(3) * step}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 4]
        checkpoints.restore({"a": jnp.ones(3)}, step=3)
        checkpoints.save(4, {"a": jnp.zeros(3)}, {}, wait=True)
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.ones(3)})[1]["a"], 0)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_saving_an_earlier_step_removes_the_later_ones(saved):
    saved.save(15, state(seed=15), {}, wait=True)
    assert saved.steps() == [10, 15]


def test_saving_the_same_again_writes_nothing(saved, monkeypatch):
    monkeypatch.setattr(step_folder, "write", None)
    assert saved.save(30, state(seed=30), {"step": 30}, wait=True) == []


def flip(path, count=64):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for i in range(middle - count // 2, middle + count // 2):
        content[i] ^= 0xFF
    path.write_bytes(content)


def file_of(folder, leaf):
    [array] = folder.glob(f"arrays/*.{leaf}")
    return max((p for p in array.iterdir()), key=lambda p: p.stat().st_size)


def test_flipped_bytes_are_caught_and_the_leaf_named(saved):
    flip(file_of(saved.directory / "30", "w"))
    step, got, _ = saved.restore(template())
    assert step == 20
    assert_same(got, values(20))
    [line] = saved.skipped
    assert line.startswith("step 30: ") and " w " in line


def test_changed_numbers_are_caught_even_if_the_array_store_reads_them(saved):
    """The array is replaced by another undamaged one, which only the checksum shows."""
    mine, other = (file_of(saved.directory / step, "deep.n").parent for step in ("30", "20"))
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    assert saved.restore(template())[0] == 20
    assert saved.skipped == ["step 30: the checksum of deep/n differs: its bytes have changed"]


def test_an_empty_step_folder_is_passed_over(saved):
    (saved.directory / "40").mkdir()
    assert saved.restore(template())[0] == 30
    [line] = saved.skipped
    assert "step 40: its manifest.json cannot be read (No such file" in line
    assert saved.steps() == [10, 20, 30]


@pytest.mark.parametrize("damage", ["cut", "changed", "not UTF-8"])
def test_a_damaged_manifest_is_passed_over(saved, damage):
    path = saved.directory / "30" / "manifest.json"
    text = path.read_text()
    damaged = {"cut": text[: len(text) // 2], "changed": text.replace('"step": 30', '"step": 31')}
    path.write_bytes(b"\xff" if damage == "not UTF-8" else damaged[damage].encode())
    assert saved.restore(template())[0] == 20
    assert saved.skipped[0].startswith("step 30: its manifest")


@pytest.mark.parametrize("file", ["manifest", "array"])
def test_a_file_that_would_never_end_is_passed_over(saved, file):
    path = saved.directory / "30" / "manifest.json"
    path = file_of(saved.directory / "30", "w") if file == "array" else path
    with path.open("r+b") as opened:
        opened.truncate(1 << 36)
    assert saved.restore(template())[0] == 20
    assert "has 68,719,476,736 bytes" in saved.skipped[0]
    path.unlink()
    os.mkfifo(path)
    assert saved.last_good() == 20 and saved.restore(template())[0] == 20
    assert "is a FIFO, not a regular file" in saved.skipped[0]


def test_a_manifest_of_brackets_is_passed_over(saved):
    (saved.directory / "30" / "manifest.json").write_text("[" * 200_000)
    assert saved.restore(template())[0] == 20
    assert saved.skipped[0].startswith("step 30: its manifest is damaged or foreign")


def test_a_missing_array_and_a_renamed_step_are_passed_over(saved):
    shutil.rmtree(file_of(saved.directory / "30", "w").parent)
    (saved.directory / "20").rename(saved.directory / "25")
    assert saved.restore(template())[0] == 10
    assert "step 30: w cannot be read" in saved.skipped[0]
    assert saved.skipped[1] == "step 25: its manifest is that of step 20"


def test_another_model_is_named_leaf_by_leaf(saved):
    other = template() | {"w": jax.ShapeDtypeStruct((16, 64), "float32"), "new": jnp.ones(2)}
    other.pop("b")
    with pytest.raises(ValueError, match="no checkpoint in .* can be restored") as error:
        saved.restore(other)
    assert (
        "step 20: it is of another state: it lacks new; b is not part of the state; "
        "w is float32[16, 32], wanted is float32[16, 64]" in str(error.value)
    )


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "100").mkdir()
    (tmp_path / "100" / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="step 100: .*another program wrote it"):
        Checkpoints(tmp_path).restore(template())
    (tmp_path / "100" / "manifest.json").write_text(json.dumps({"files": []}))
    with pytest.raises(ValueError, match="step 100: its manifest is damaged or foreign"):
        Checkpoints(tmp_path).restore(template())
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "nowhere").restore(template())


def test_a_full_disk_destroys_no_good_step(tmp_path):
    """No file may exceed 1,000 bytes, so a write fails as on a full disk, for any user."""
    big = {"w": state()["w"]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, big, {}, wait=True)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            assert checkpoints.save(2, big, {}) == []
            [trouble] = checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "step 2 was not written" in trouble and "File too large" in trouble
        assert "it needs 0.0 MB" in trouble and "the last good one is step 1" in trouble
        assert os.listdir(tmp_path) == ["1"]
        assert checkpoints.save(3, big, {}, wait=True) == []
        assert checkpoints.steps() == [3]


@pytest.fixture
def disk(monkeypatch):
    """A disk that says it is full while it holds more steps than `disk.room`."""
    disk = types.SimpleNamespace(room=100)

    def write(folder, arrays):
        write_arrays(folder, dict(list(arrays.items())[:1]))  # a part of it
        if len(list(folder.parents[1].glob("*"))) > disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_arrays(folder, dict(list(arrays.items())[1:]))

    monkeypatch.setattr(step_folder, "write_arrays", write)
    return disk


def test_on_a_full_disk_the_oldest_step_gives_way_but_never_the_last_good_one(tmp_path, disk):
    state = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, state, {}, wait=True) == []
        flip(next((tmp_path / "3").glob("arrays/*.a/0")), count=2)
        flip(next((tmp_path / "2").glob("arrays/*.b/0")), count=2)
        disk.room = 3
        lines = checkpoints.save(4, state, {}, wait=True)
        # Step 1 is the oldest, but 2 and 3 are damaged.
        assert lines == ["the disk is full: step 2 gave way to step 4"]
        assert sorted(os.listdir(tmp_path)) == ["1", "3", "4"]
        disk.room = 1
        lines = checkpoints.save(5, state, {}, wait=True)
        assert lines[:2] == [f"the disk is full: step {n} gave way to step 5" for n in (1, 3)]
        assert "step 5 was not written" in lines[2] and "No space left on device" in lines[2]
        assert "the last good one is step 4" in lines[2]
        assert os.listdir(tmp_path) == ["4"]
        assert checkpoints.restore(state)[0] == 4


def test_what_killed_processes_left_is_removed_and_named(saved):
    (saved.directory / "25.partial" / "arrays").mkdir(parents=True)
    (saved.directory / "25.partial" / "arrays" / "x").write_bytes(bytes(200_000))
    (saved.directory / "writable.partial").touch()
    (saved.directory / "15").mkdir()
    partial, probe, odd = saved.clean()
    assert partial == "removed 25.partial, whose saving or removal was cut short (0.2 MB)"
    assert probe.startswith("removed writable.partial")
    assert odd.startswith("step 15 has no manifest.json")
    assert sorted(os.listdir(saved.directory)) == ["10", "15", "20", "30"]


def test_a_removal_that_is_cut_short_leaves_no_half_of_a_step(saved, monkeypatch):
    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        saved._prune(15)  # of a run that was resumed at 10: steps 20 and 30 go
    monkeypatch.undo()
    assert sorted(os.listdir(saved.directory)) == ["10", "20.removed.partial", "30"]
    assert [line.split(",")[0] for line in saved.clean()] == ["removed 20.removed.partial"]


def test_a_step_whose_folder_is_gone_does_not_bring_it_back(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.check_writable()
        shutil.rmtree(tmp_path / "run")
        [trouble] = checkpoints.save(1, {"a": jnp.ones(3)}, {}, wait=True)
        assert "No such file or directory" in trouble
    assert os.listdir(tmp_path) == []


def test_a_bad_write_is_detected_before_an_older_step_is_removed(tmp_path, monkeypatch):
    def damaging(folder, arrays):
        write_arrays(folder, arrays)
        flip(file_of(folder.parent, "w"))

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(), {}, wait=True)
        monkeypatch.setattr(step_folder, "write_arrays", damaging)
        [trouble] = checkpoints.save(2, state(), {}, wait=True)
        assert "the checkpoint of step 2 was not written" in trouble
        assert checkpoints.restore(template())[0] == 1


def test_the_next_save_removes_what_a_killed_process_left(saved):
    (saved.directory / "25.partial").mkdir()
    assert saved.restore(template())[0] == 30
    saved.save(40, state(), {}, wait=True)
    assert sorted(os.listdir(saved.directory)) == ["20", "30", "40"]


def test_a_path_may_lead_up_and_down(tmp_path):
    with Checkpoints(tmp_path / "a" / ".." / "b" / ".." / "checkpoints") as checkpoints:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        checkpoints.check_writable()
        assert checkpoints.save(1, {"a": jnp.ones(3)}, {}, wait=True) == []
        assert checkpoints.restore({"a": jnp.ones(3)})[0] == 1


def test_a_name_that_the_array_store_does_not_take_is_refused_first(tmp_path):
    with pytest.raises(OSError, match="cannot be written to .*; mend that or choose another --out"):
        Checkpoints(tmp_path / "a\udcff").check_writable()


def test_free_space_and_permissions_are_checked_first(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
    checkpoints.check_writable(template())
    assert list(checkpoints.directory.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5000))
    wanted = "keep=3 needs room for 4 checkpoints, 0.5 MB more .* has 0.0 MB free; .*--keep"
    with pytest.raises(OSError, match=wanted):
        checkpoints.check_writable(template())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to .*Not a directory.*another --out"):
        Checkpoints(tmp_path / "file" / "checkpoints").check_writable()


def test_refuses_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="extra cannot be saved as JSON"):
        Checkpoints(tmp_path).save(1, {}, {"array": jnp.ones(2)})
    with pytest.raises(ValueError, match="keep=0 must be 1 or more"):
        Checkpoints(tmp_path, keep=0)
