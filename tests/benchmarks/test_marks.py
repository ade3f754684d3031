"""The matrix of marks has every public operation; a small part of it is made here for TPUs."""

import json
import re

import jax
import pytest

import wsekern as wk
from benchmarks import marks
from benchmarks.marks import Mark
from wsekern import fabric

# Names that compute nothing on a chip: machines, results, reports, pictures, modules.
_NO_OPERATION = {"A100", "H100", "H200", "TPU_7X", "TPU_V5E", "TPU_V5P", "TPU_V6E"}
_NO_OPERATION |= {"WSE1", "WSE2", "WSE3", "Accelerator", "Machine", "Wafer", "emulate_devices"}
_NO_OPERATION |= {"Compilation", "Defects", "Estimate", "Explanation", "Memory", "Placement"}
_NO_OPERATION |= {"Solution", "Traffic", "compile", "estimate", "explain_matmul", "memory"}
_NO_OPERATION |= {"traffic", "roofline", "scaling", "terminal_map", "wafer_map"}
_NO_OPERATION |= {"check_time_step", "difference_coefficients", "diffusion_limit", "wave_limit"}
_NO_OPERATION |= {"layout"}
_NO_MOVE = {"Algorithm", "Along", "Op", "Ring", "cheapest", "predicted_cycles", "received"}
_NO_MOVE |= {"ring_order"}  # a list of Python's

# One of each family, of those that compile in a second or two.
SMALL = ["matmul", "matmul, summa", "matmul, cannon", "matmul, collective", "matmul, stationary"]
SMALL += ["gemv", "attention, causal", "attention, causal, ulysses", "attention, window"]
SMALL += ["KVPages.write and paged_attention", "KVPages.write and paged_attention, int8"]
SMALL += ["KVCache.append and decode_attention", "experts", "load_balance_loss", "embedding"]
SMALL += ["rms_norm", "layer_norm", "cross_entropy", "rotary", "stencil of one step"]
SMALL += ["stencil without overlap", "stencil_tile", "halo_exchange, reflect", "halo_tile", "cg"]
SMALL += ["fabric.shift, folded", "fabric.transpose", "fabric.broadcast", "fabric.all_to_all"]
SMALL += ["fabric.all_reduce, two_phase", "fabric.reduce, k_tree", "fabric.all_reduce, ring"]


@pytest.fixture(autouse=True)
def as_a_user_writes():
    with jax.numpy_rank_promotion("allow"):
        yield


def cases(wafer):
    return {case.name: case for case in marks.all_cases(wafer, "bfloat16")}


def test_every_public_operation_stands_in_the_table():
    names = list(cases(wk.Wafer.devices(2, 2, 2)))  # several wafers, and square: all are meant
    words = {word for name in names for word in re.findall(r"\w+", name)}
    assert set(wk.__all__) - words - {"fabric"} == _NO_OPERATION
    moves = {word for name in names for word in re.findall(r"fabric\.(\w+)", name)}
    assert set(fabric.__all__) - moves == _NO_MOVE


def test_an_operation_stands_once():
    names = [case.name for case in marks.all_cases(wk.Wafer.devices(2, 4), "float32")]
    assert len(set(names)) == len(names)
    assert "fabric.transpose" not in names and "matmul, 2.5d" not in names


@pytest.mark.tpu
@pytest.mark.parametrize("name", SMALL)
def test_it_compiles_for_tpus(name):
    wafer = wk.Wafer.topology("v5e:4x4")
    case = cases(wafer)[name]
    compiled = marks.compile_case(case, wafer, "backward" if case.has_gradient else "forward")
    assert compiled.fits and compiled.seconds > 0


@pytest.mark.tpu
def test_experts_multiply_no_row_by_all_weights():
    """As XLA's `ragged_dot` does: their loop over blocks takes a quarter of its cycles at most."""
    wafer = wk.Wafer.topology("v5e:4x4")
    case = cases(wafer)["experts"]
    with wafer:
        program = jax.make_jaxpr(case.function)(*case.operands)
    assert "ragged_dot" not in str(program)


@pytest.fixture
def made(tmp_path):
    """A file of marks, as `--json` writes it."""
    found = [
        Mark(operation="gemv", target="t", dtype="d", direction="forward", temporaries=2**19),
        Mark(operation="gemv", target="t", dtype="d", direction="backward", error="E: no"),
        Mark(operation="rotary", target="t", dtype="d", direction="forward", kernels={"splash": 2}),
        Mark(operation="rotary", target="u", dtype="d", direction="forward", error="E: no"),
    ]
    path = tmp_path / "marks.json"
    path.write_text(json.dumps({"marks": [vars(mark) for mark in found]}))
    return path


def test_the_table_has_a_row_for_each_operation_and_errors_below(made, tmp_path, capsys):
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit, match="1"):
        marks.main(["--target", "--merge", str(made), "--out", str(out)])
    lines = out.read_text().splitlines()
    assert lines[0] == "| operation | t d | u d |"
    assert lines[2:4] == ["| gemv | 0.5 / ✗1 |  |", "| rotary | 0 / - (splash) | ✗1 / - |"]
    assert lines[-1] == "1. E: no" and "2 of 4 compiled" in lines[-2]
    assert capsys.readouterr().out == out.read_text()


def test_a_summary_counts_the_programs_of_each_public_name(made, capsys):
    with pytest.raises(SystemExit, match="1"):
        marks.main(["--target", "--merge", str(made), "--summary"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| operation | t | u |"
    assert lines[2] == "| `gemv` | 1 of 2, 0.5 MiB | - |"
    assert lines[3] == "| `rotary` | 1 of 1, 0 MiB | 0 of 1, 0 MiB |"


def test_an_unknown_target_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        marks.main(["--target", "v5f:4x4"])
    assert "benchmarks marks: error: topology 'v5f:4x4' is not known" in capsys.readouterr().err
