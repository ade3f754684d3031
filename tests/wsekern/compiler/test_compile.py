"""What compilers of TPUs that are not there say of programs; needs libtpu."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.cli import main
from wsekern.compiler.report import size

pytestmark = pytest.mark.tpu
SIDE = 1024
MATRIX = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16)


@pytest.fixture(scope="module")
def chips():
    return wk.Wafer.topology("v5e:2x2")


@pytest.fixture(scope="module")
def looped(chips):
    def program(a, b):
        step = lambda c, _: (jnp.tanh(c @ b), None)  # noqa: E731
        return jax.lax.scan(step, a, None, length=12)[0]

    return wk.compile(program, MATRIX, MATRIX, wafer=chips)


def test_memory_is_that_of_one_chip(looped):
    quarter = SIDE * SIDE * 2 // 4
    assert looped.fits and looped.memory.arguments == looped.argument_bytes == 2 * quarter
    assert looped.memory.results == quarter
    assert looped.memory.total >= 3 * quarter


def test_transfers_of_a_loop_are_counted_for_each_trip_and_by_axis(looped):
    received = SIDE * SIDE * 2 // 4  # a half of a matrix, of which a quarter is there already
    along = {axis: 0.0 for axis in "yx"}
    for key, sent in looped.cost.sent.items():
        assert set(key.axes) <= set(along)
        for axis in key.axes:
            along[axis] += sent.bytes
    assert along == {"y": 12 * received, "x": 12 * received}
    assert 0 < looped.waited_bytes <= looped.sent_bytes == 24 * received


def test_the_time_has_three_parts_and_its_longest_operation_is_on_the_users_line(looped):
    cost = looped.cost
    assert looped.seconds == cost.fusion_seconds + cost.kernel_seconds + cost.waited_seconds
    assert cost.cycles >= 12 * 2 * SIDE**3 / 4 / (4 * 128 * 128 * 2) and not cost.unknown_loops
    assert any(re.fullmatch(r"test_compile.py:\d+", place.line) for place in cost.places)
    assert looped.roofline_seconds == pytest.approx(12 * 2 * SIDE**3 / 4 / 197e12, rel=0.1)


def test_a_report_says_everything_as_text_json_and_page(looped, tmp_path):
    text = str(looped)
    for part in ("2x2 of TPU v5e", "it fits", "modelled time", "waiting", "all-gather"):
        assert part in text
    assert f"temporaries {size(looped.memory.temporaries)}" in text
    fields = json.loads(json.dumps(looped.as_json()))
    assert fields["fits"] and fields["grid"] == [1, 2, 2] and fields["seconds"] == looped.seconds
    looped.html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and "Longest operations" in page and "What it sends" in page
    assert looped._repr_html_().startswith("<table>")


def test_operations_of_the_library_are_compiled_on_the_wafer(chips):
    found = wk.compile(wk.matmul, MATRIX, MATRIX, wafer=chips)
    assert found.fits and found.sent_bytes > 0
    with chips:
        assert wk.compile(wk.matmul, MATRIX, MATRIX).sent_bytes == found.sent_bytes


def test_a_program_that_does_not_fit_says_by_how_much_and_names_its_arrays(chips):
    def outer(x):
        long = jnp.tile(x, (2**6, 1))
        return jnp.tanh(long @ long.T).sum()

    found = wk.compile(outer, jax.ShapeDtypeStruct((4096, 128), jnp.float32), wafer=chips)
    if found.fits:  # the compiler fused it
        pytest.skip("the compiler needs no array for it")
    assert found.memory.total > found.chip.memory_bytes and found.cost is None
    largest = found.largest_arrays[0]
    assert not found.arrays_estimated and largest.shape == (2**18, 2**18)
    assert largest.line.startswith("test_compile.py:")
    assert "more than the 16 GiB of a chip" in str(found)


def test_an_array_has_the_layout_that_it_comes_with(chips):
    whole = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16, sharding=chips.sharding(P(None, None)))
    found = wk.compile(lambda a: a + 1, whole, wafer=chips)
    assert found.argument_bytes == SIDE * SIDE * 2 and found.sent_bytes == 0


def test_other_wafers_are_refused():
    with pytest.raises(ValueError, match="compile: there is no wafer"):
        wk.compile(jnp.tanh, MATRIX)
    with pytest.raises(ValueError, match="not of TPUs or GPUs whose figures are known"):
        wk.compile(jnp.tanh, MATRIX, wafer=wk.Wafer.devices(2, 2))


def test_the_command_compiles_a_function_of_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text(
        "import jax, jax.numpy as jnp\nimport wsekern as wk\n"
        "def SHAPES(wafer):\n"
        "    spec = wafer.sharding(jax.sharding.PartitionSpec('y', 'x'))\n"
        "    return [jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=spec)]\n"
        "def square(a):\n    return wk.matmul(a, a)\n"
    )
    monkeypatch.chdir(tmp_path)
    main(["compile", "program.py:square", "--target", "v5e:2x2", "--html", "out.html"])
    printed = capsys.readouterr().out
    assert "program.py:square" in printed and "it fits" in printed
    assert (tmp_path / "out.html").stat().st_size > 2000
    main(["compile", "program.py:square", "--target", "v5e:2x2", "--wafer", "1x4", "--json"])
    assert json.loads(capsys.readouterr().out)["grid"] == [1, 1, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "v9:2x2"], "topology 'v9:2x2' is not known; known are v5e:4x4 (16 chips)"),
        (["--target", "v5e:2x2", "--wafer", "3x3"], "3x3 is 9 PEs, and v5e:2x2 has 4 devices"),
        (["--target", "v5e:2x2", "--shapes", "64x64"], "shape '64x64' is not like"),
        (["--target", "v5e:2x2", "--html", "/no/such/x.html"], "there is no folder '/no/such'"),
    ],
)
def test_a_command_that_cannot_be_served_ends_with_status_2(words, message, tmp_path, capsys):
    program = tmp_path / "program.py"
    program.write_text("def f(a):\n    return a\nSHAPES = []\n")
    with pytest.raises(SystemExit) as stop:
        main(["compile", f"{program}:f", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
