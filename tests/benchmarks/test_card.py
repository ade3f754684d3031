"""The run on a card: right and wrong results, the clock, what is written, what is refused."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from benchmarks import card
from benchmarks.on_card import correctness, race
from benchmarks.on_card.cases import ALONE, VIRTUAL, CheckedCall, cases
from benchmarks.on_card.row import Row, quantity
from benchmarks.on_card.session import TERMINATED, Ceilings, Session, failure

ALL = cases(small=True)
# Public functions below kernels/ that are checked as parts of others, or compute nothing.
PARTS = {"crop", "halo_tile", "stencil_tile", "KVCache", "KVPages", "Sources", "Receivers"}
WITHOUT_ARRAYS = {
    "check_time_step",
    "difference_coefficients",
    "diffusion_limit",
    "explain_matmul",
    "wave_limit",
}


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path, minutes=5, small=True)


def check(case, dtype, wafer):
    (row,) = correctness._check("a check", case, dtype, wafer, {})
    return row


def case_of(operation, name=""):
    return next(case for case in ALL if (case.operation, case.name) == (operation, name))


def test_every_kernel_and_solver_is_checked():
    known = {
        name
        for name, home in wk._HOMES.items()
        if home.startswith(("kernels.", "solvers.")) and name != "Solution"
    }
    assert {case.operation for case in ALL} == known - PARTS - WITHOUT_ARRAYS


@pytest.mark.parametrize(
    "operation", ["gemv", "rotary", "rms_norm", "decode_attention", "paged_attention"]
)
@pytest.mark.parametrize(("dtype", "wafer"), [("float32", ALONE), ("bfloat16", VIRTUAL)])
def test_right_results_pass(operation, dtype, wafer):
    row = check(case_of(operation), dtype, wafer)
    assert row.status == "done" and row.error is not None and row.tolerance is not None
    assert 0 <= row.error < row.tolerance


def wrong(change):
    """A case whose result is that of the reference, but for `change`."""
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    return CheckedCall(
        operation="tanh",
        operands=(x,),
        ours=lambda wafer, x: change(jnp.tanh(x)),
        plain=jnp.tanh,
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda y: 1.01 * y,
        lambda y: y.at[3, 4].add(0.02),  # one element of 64
        lambda y: y.at[0, 0].set(jnp.nan),
        lambda y: y[:4],
    ],
    ids=["scaled", "one element", "NaN", "shape"],
)
def test_wrong_results_fail(change):
    row = check(dataclasses.replace(wrong(change), gradient=False), "float32", ALONE)
    assert row.status == "failed" and row.note.startswith("result 0: error")


def test_a_wrong_gradient_fails():
    assert check(wrong(lambda y: y), "float32", ALONE).status == "done"
    row = check(wrong(jax.lax.stop_gradient), "float32", ALONE)
    assert row.status == "failed" and row.note.startswith("gradient 0: error 1.0e+00")


def test_products_are_raced_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # main sets it: undone afterwards
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    card.main(
        ["--platform", "cpu", "--small", "--only", "products", "--minutes", "5"]
        + ["--out", str(tmp_path / "results")]
    )
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    content = json.loads((tmp_path / "results" / "card.json").read_text())
    rows = [row for row in content["rows"] if row["section"] == "products"]
    assert {row["status"] for row in rows} == {"done"} and content["ended"] == "all was tried"
    assert {row["candidate"] for row in rows} == {"jnp.matmul", "wsekern", "wsekern, 1x1"}
    for row in rows:
        assert row["rate"] * row["seconds"] > 0 and row["compile_seconds"] > 0
        assert (row["ratio"] is None) == (row["candidate"] == "jnp.matmul")
        assert row["share"] == pytest.approx(row["rate"] / content["ceilings"]["flops"])
    table = (tmp_path / "results" / "card.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| products | 128 x 128 x 128, bfloat16 | wsekern |" in table


def test_nothing_is_begun_when_there_is_no_time(tmp_path):
    session = Session(tmp_path, minutes=0, small=True)
    card.run(session, list(card.SECTIONS))
    session.finish()
    assert {row.section for row in session.rows} == {"ceilings", *card.SECTIONS}
    assert {row.status for row in session.rows} == {"no time"}
    table = (tmp_path / "card.md").read_text()
    assert "no time: matmul, float32, no wafer to" in table and len(table.splitlines()) < 40


def test_measurements_that_took_long_make_later_ones_expected_to(session):
    before = session.expect(1.0)
    session._estimated, session._took = 1.0, 3.0
    assert session.expect(1.0) == pytest.approx(3 * before)
    session._took = 0.1
    assert session.expect(1.0) == pytest.approx(before)


def test_what_raises_is_a_row_and_the_next_is_measured(session):
    def raises():
        yield Row(measurement="first")
        raise ValueError("no such tile\nand more")

    session.measure("a", 0.0, raises)
    session.measure("b", 0.0, lambda: [Row(measurement="b")])
    assert [row.status for row in session.rows] == ["done", "error", "done"]
    assert session.rows[1].note == "ValueError: no such tile" and "raises" in session.rows[1].trace
    rows = json.loads((session.folder / "card.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["done", "error", "done"]


def test_a_missing_package_is_named(session, monkeypatch):
    assert failure("x", ModuleNotFoundError(name="flax.nnx")).note == "flax not installed"
    for name in ("benchmarks.on_card.training", "optax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "optax", None)
    card._run_section(session, "training", 1.0)
    (row,) = session.rows
    assert (row.section, row.status, row.note) == ("training", "missing", "optax not installed")


def test_a_peer_that_cannot_be_had_does_not_count_as_an_error(session):
    def no_peer():
        raise RuntimeError("cuDNN is not detected")

    def ours():
        return race.harness.compile_program(jnp.sin, jnp.ones(8))

    sizes: Any = {"work": 16, "unit": "FLOP/s", "cost": 0.0, "peer": "peer"}
    race.race(session, "sine", {"peer": no_peer, "ours": ours}, ceiling=(32.0, "it"), **sizes)
    peer, row = session.rows
    assert (peer.status, peer.candidate) == ("missing", "peer")
    assert row.ratio is None and row.share == pytest.approx(row.rate / 32.0)
    race.race(session, "sine", {"ours": no_peer, "peer": ours}, **sizes)
    assert [r.status for r in session.rows[2:]] == ["error", "done"]


def test_kernels_are_found_by_name():
    text = 'custom_call_target="__cudnn$fmhaSoftmax", custom_call_target="Sharding"\n'
    text += 'custom_call_target="__cudnn$fmhaSoftmax" "kind":"__triton_gemm"'
    program = race.harness.CompiledProgram(
        run=int, compile_seconds=0.0, temp_bytes=0, text=lambda: text
    )
    assert race.kernels_of(program) == ("__cudnn$fmhaSoftmax", "__triton_gemm")


def test_figures_as_text():
    assert quantity(7.9e14, "FLOP/s") == "790 TFLOP/s"
    assert quantity(12_345.6, "tokens/s") == "12,346 tokens/s"
    assert Ceilings(flops=1.0).rated == (1.0, "the measured peak")
    assert Ceilings(flops=1.0, sheet_flops=2.0).rated == (2.0, "the data sheet")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "'0' must be a number of minutes above 0, at most 1,440"),
        (["--minutes", "soon"], "'soon' must be a number of minutes"),
        (["--only", "produts"], "'produts' is not one of .*; did you mean 'products'?"),
        (["--platform", "abacus"], "invalid choice: 'abacus'"),
        ([], "jax finds no GPU or TPU here; .*--platform cpu --small"),
        (["--platform", "cpu", "--out", os.devnull], "File exists"),
    ],
)
def test_refuses(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    with pytest.raises(SystemExit) as end:
        card.main(flags)
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors.replace("\n", " ")), errors


@pytest.mark.slow
def test_sigterm_writes_what_there_is(tmp_path):
    flags = ["--platform", "cpu", "--small", "--only", "attention,stencils", "--out", str(tmp_path)]
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "card", *flags], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    while not run.stdout.readline().startswith("attention:"):
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    rest, _ = run.communicate(timeout=60)
    assert run.returncode == TERMINATED
    content = json.loads((tmp_path / "card.json").read_text())
    assert content["ended"] == "SIGTERM came"
    assert content["rows"][-1]["section"] == "stencils"
    assert content["rows"][-1]["status"] == "no time"
    assert "SIGTERM came" in rest and "| stencils | everything |" in rest
