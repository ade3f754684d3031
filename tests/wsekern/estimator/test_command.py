"""The command `wsekern estimate`: what it prints, and what it refuses."""

import json

import pytest

from wsekern.cli import main

PROGRAM = """
import jax
import jax.numpy as jnp
import wsekern as wk

SHAPES = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2


def step(a, b):
    return wk.matmul(a, b, algorithm="mesh_gemm")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PROGRAM)
    return str(path)


def test_it_prints_a_table_and_json(program, capsys):
    main(["estimate", f"{program}:step", "--machine", "CS-2", "--grid", "8x8"])
    assert "WSE-2, 8x8 PEs, 0.85 GHz" in capsys.readouterr().out
    words = ["--grid", "4x4", "--json", "--clock", "1.1", "--shapes", "8x8:float16", "8x8:float16"]
    main(["estimate", f"{program}:step", *words])
    fields = json.loads(capsys.readouterr().out)
    assert fields["machine"] == "WSE-3" and fields["grid"] == [4, 4, 1]
    assert fields["extra_cycles"] == 0.0
    assert fields["seconds"] == pytest.approx(fields["cycles"] / 1.1e9)


def test_the_table_has_a_line_about_defects(program, capsys):
    main(["estimate", f"{program}:step", "--grid", "32x32", "--pe-yield", "0.95"])
    assert " of 762x1272 PEs faulty; neighbors up to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}:stop"], "has no function 'stop'; did you mean 'step'?"),
        (["{}:step", "--machine", "cs-33"], "machine 'cs-33' is not known; did you mean 'CS-3'?"),
        (["{}:step", "--grid", "9"], "grid '9' is not HEIGHTxWIDTH"),
        (["{}:step", "--grid", "2000x9"], "2000x9 PEs do not fit WSE-3"),
        (["{}:step", "--pe-yield", "0.5"], "755x1170 PEs do not fit a wafer of 762x1272"),
        (["{}:step", "--shapes", "8x8"], "shape '8x8' is not like 4096x4096:float16"),
        (["{}:step", "--shapes", "8x8:floaty"], "'floaty' is no dtype"),
        (["{}:step", "--clock", "0"], "clock=0.0 must be a number from 1e-9 to 1,000, in GHz"),
        (["{}:step", "--clock", "-1"], "clock=-1.0 must be"),
        (["{}:step", "--clock", "nan"], "clock=nan must be"),
        (["{}:step", "--clock", "inf"], "clock=inf must be"),
        (["{}:step", "--density", "nan"], "density=nan must be from 0 to 1"),
        (["{}:step", "--trips", "-1"], "trips=-1 must be 0 or more"),
        (["{}:step", "--launches", "0"], "launches=0 must be 1 or more"),
        (["{}:step", "--pe-yield", "nan"], "pe_yield=nan must be from 0 to 1"),
        (["{}:step", "--wafers", "0"], "wafers"),
        (["{}:step", "--wafers", "9" * 20], f"wafers={'9' * 20} must be from 1 to 2,048"),
        (["{}:step", "--shapes", "8x8:float16"], "step(a, b) cannot be called with 1 operands"),
        (["{}:step", "--shapes"], "give the shape of each, as --shapes 4096x4096:float16"),
        (["nowhere.py:step"], "there is no file 'nowhere.py'"),
        (["{}"], "names no function; write FILE.py:FUNCTION"),
        ([], "name a program, as FILE.py:FUNCTION, or --validate"),
        (["--validate", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_refuses_by_message(program, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *(word.format(program) for word in words)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_without_shapes_is_asked_for_them(tmp_path, capsys):
    path = tmp_path / "mine.py"
    messages = {
        "": "--shapes 4096x4096:float16, or in the variable SHAPES",
        "SHAPES = 3": "the variable SHAPES is 3; it must be a list",
    }
    for shapes, message in messages.items():
        path.write_text(f"{shapes}\ndef step(a, b):\n    return a + b\n")
        with pytest.raises(SystemExit) as ended:
            main(["estimate", f"{path}:step"])
        [line] = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and message in line
