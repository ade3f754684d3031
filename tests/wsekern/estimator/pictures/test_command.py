"""The pictures that `wsekern estimate` writes."""

import json

import pytest

from wsekern.cli import main

pytest.importorskip("matplotlib")
PROGRAM = """
import jax
import jax.numpy as jnp
import wsekern as wk

SHAPES = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 2


def step(a, b):
    if RAN:
        raise RuntimeError("it was estimated")
    return wk.matmul(a, b)
"""


@pytest.fixture
def program(tmp_path):
    def write(ran):
        path = tmp_path / "mine.py"
        path.write_text(PROGRAM.replace("RAN", str(ran)))
        return f"{path}:step"

    return write


def test_it_writes_a_page_a_trace_and_a_map(program, tmp_path, capsys):
    paths = {flag: tmp_path / f"e{end}" for flag, end in
             (("--html", ".html"), ("--trace", ".json"), ("--plot", ".png"))}  # fmt: skip
    flags = [str(word) for pair in paths.items() for word in pair]
    main(["estimate", program(False), "--grid", "4x4", "--map", *flags])
    printed = capsys.readouterr().out
    assert "words on the busiest link of each PE" in printed
    assert "WSE-3, 4x4 PEs, 0.85 GHz" in printed
    assert "mine.py:step</h1>" in paths["--html"].read_text()
    assert json.loads(paths["--trace"].read_text())["traceEvents"]
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html", "{}/none/e.html"], "there is no folder"),
        (["--trace", "{}"], "no regular file"),
        (["--plot", "{}/e.txt"], "must end in .png or .svg or .pdf"),
        (["--html", "{}/e", "--trace", "{}/e"], "name one file twice"),
        (["--map", "sarm"], "did you mean 'sram'?"),
        (["--map", "load", "--json"], "give one of them"),
    ],
)
def test_it_refuses_before_it_estimates(program, tmp_path, capsys, words, message):
    words = [word.format(tmp_path) for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["estimate", program(True), "--grid", "4x4", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_it_plots_predictions_and_refuses_a_page_of_them(tmp_path, capsys):
    table = tmp_path / "points.csv"
    table.write_text(
        "id,machine,workload,grid,parameters,quantity,value,unit,clock_ghz,source\n"
        "mine,WSE-2,dense GEMM fp32 baseline,16x12,N=96 K=96 M=8,mean cycles,9000,cycles,,own\n"
    )
    path = tmp_path / "points.png"
    main(["estimate", "--validate", str(table), "--plot", str(path)])
    assert "mine" in capsys.readouterr().out and path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["estimate", "--validate", str(table), "--html", "e.html"])
    assert "--html is of a program, not of --validate" in capsys.readouterr().err
