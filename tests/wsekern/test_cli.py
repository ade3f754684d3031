"""The command `wsekern`: its help, its tables, its errors and their exit status."""

import subprocess
import sys
import time

import jax
import pytest

import wsekern.cli
from wsekern.cli import main

# Runs the command in a fresh interpreter, then says whether it has loaded jax.
COMMAND = """
import sys
from wsekern.cli import main
try:
    main(sys.argv[1:])
finally:
    print("jax is loaded:", "jax" in sys.modules)
"""


def fresh(script, *words):
    run = [sys.executable, "-c", script, *words]
    return subprocess.run(run, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [[], ["--help"], ["info", "--help"], ["bench", "--help"]])
def test_help_needs_no_jax(words):
    run = fresh(COMMAND, *words)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: wsekern")
    assert run.stdout.endswith("jax is loaded: False\n")


def test_help_answers_within_half_a_second():
    # The fastest of three: a machine that is busy with other tests shows in all but the best.
    def seconds():
        start = time.perf_counter()
        fresh(COMMAND, "--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_library_is_imported_without_jax():
    run = fresh("import sys, wsekern, wsekern.hardware; print('jax' in sys.modules)")
    assert run.stdout == "False\n"


def test_info_tells_the_devices_and_the_machines(capsys):
    main(["info"])
    output = capsys.readouterr().out
    assert "devices: 16 x cpu, emulated on the CPU\n" in output
    assert "wk.Wafer.devices(height=4, width=4)\n" in output
    rows = {line[:5]: line.split() for line in output.splitlines()}
    # 745,500 PEs at 0.85 GHz: two FLOPs a fused multiply-add, one such of float32, four of 16 bits.
    assert (
        rows["WSE-2"] == "WSE-2 750x994 48 KiB 36.6 GB 0.85 GHz 1.27 PFLOP/s 5.07 PFLOP/s".split()
    )
    assert "TPU v" in rows


@pytest.mark.parametrize(
    ("count", "grid"), [(1, (1, 1)), (7, (1, 7)), (8, (2, 4)), (12, (3, 4)), (16, (4, 4))]
)
def test_the_grid_takes_all_devices(count, grid):
    assert wsekern.cli._squarest(count) == grid


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ifno"], "'ifno' is not a command; did you mean 'info'?"),
        (["serve"], "'serve' is not a command; commands are info, estimate, compile, bench"),
        (["info", "--all"], "unrecognized arguments: --all"),
        (["--verson", "info"], "unrecognized arguments: --verson"),
    ],
)
def test_a_bad_command_line_is_named_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_device_is_told_with_the_mend():
    script = "from wsekern.cli import main; main(['info'])"
    run = fresh(f"import os; os.environ['JAX_PLATFORMS'] = 'abacus'; {script}")
    assert run.returncode == 1
    assert "jax finds no device with JAX_PLATFORMS='abacus'; set it to cpu" in run.stderr
    assert "Traceback" not in run.stderr


def test_bench_hands_its_words_to_the_benchmarks_of_the_checkout(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text("import sys; print(__name__, sys.argv[1:])")
    run = fresh(
        "import pathlib, sys, wsekern.cli as cli; cli._CHECKOUT = pathlib.Path(sys.argv[1]); "
        "cli.main(['bench', 'matmul', '--side', '4', '--help'])",
        str(tmp_path),
    )
    assert run.stdout == "__main__ ['matmul', '--side', '4', '--help']\n"


def test_bench_of_an_installed_package_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(wsekern.cli, "_CHECKOUT", tmp_path)
    with pytest.raises(
        SystemExit, match=r"clone it, and in the clone run `pip install -e '.\[train\]'`"
    ):
        main(["bench"])


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(
    "script",
    [
        "from wsekern.cli import main; main(['info'])",
        "import wsekern as wk; wk.emulate_devices(4); print(wk.Wafer.devices(2, 2))",
    ],
    ids=["info", "a program of one's own"],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_the_compiler_of_tpus_keeps_quiet_where_there_is_none(script, monkeypatch):
    """Although JAX looks for TPUs, as it does for a user who has set no JAX_PLATFORMS."""
    names = ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    run = fresh(script)
    assert run.returncode == 0 and run.stdout
    assert run.stderr == ""
