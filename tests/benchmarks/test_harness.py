"""The harness: turns, ratios, compiled programs, the list, the file it writes."""

import json
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import harness
from benchmarks.__main__ import main


def test_ratios_are_to_the_baseline_and_order_is_kept():
    sleepers = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}
    slow, fast = harness.compare(sleepers, "fast", rounds=4)
    assert (slow.name, fast.name) == ("slow", "fast")
    assert fast.ratio == fast.low == fast.high == 1.0
    assert 1.5 < slow.ratio and slow.low <= slow.ratio <= slow.high
    assert slow.seconds >= 0.03


def test_every_round_runs_every_candidate_in_turn():
    seen = []

    def candidate(name):
        def run():
            seen.append(name)
            time.sleep(0.03)

        return run

    harness.compare({n: candidate(n) for n in "abc"}, "a", rounds=3)
    warm_up = 6
    assert "".join(seen[warm_up:]) == "abccbaabc"


def test_compiled_reports_compile_time_and_temporaries():
    x = jnp.ones((64, 64))
    case = harness.compile_program(lambda x: jnp.sin(x @ x) @ x, x)
    (result,) = harness.compare({"it": case}, "it", rounds=1)
    assert result.compile_seconds == case.compile_seconds > 0
    assert result.temp_bytes == case.temp_bytes
    assert (case.temp_bytes or 0) >= x.nbytes
    assert jnp.allclose(case(), jax.jit(lambda x: jnp.sin(x @ x) @ x)(x))


def test_refuses():
    with pytest.raises(ValueError, match="baseline='c' is not a candidate; they are"):
        harness.compare({"a": int}, "c")
    with pytest.raises(ValueError, match="rounds is 0, it must be 1 or more"):
        harness.compare({"a": int}, "a", rounds=0)


def test_table_and_file_hold_the_results(tmp_path, capsys):
    results = harness.compare({"one": int, "two": str}, "one", rounds=2, notes={"two": "a remark"})
    harness.show("a title", results, {"letters": lambda r: str(len(r.name))})
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("a title", "one", "two", "letters", "a remark"))
    file = tmp_path / "out.json"
    harness.dump(file, {"a title": results}, {"rounds": 2})
    content = json.loads(file.read_text())
    assert content["rounds"] == 2
    assert content["environment"]["jax"] == jax.__version__
    assert [r["name"] for r in content["tables"]["a title"]] == ["one", "two"]


def test_lists_the_benchmarks(capsys):
    assert main([]) == 0
    assert "matmul" in capsys.readouterr().out


def test_unknown_benchmark_is_refused_with_a_suggestion(capsys):
    assert main(["matmull"]) == 2
    assert "did you mean 'matmul'?" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--json", "nowhere/x.json"], ["--json=nowhere/x.json"]])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(flags, capsys):
    assert main(["stencil", *flags]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_benchmark_needs_no_flag(monkeypatch):
    called: list = []
    module = types.SimpleNamespace(main=called.append)
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    assert main(["stencil"]) == 0 and called == [[]]


def test_help_does_not_import_jax():
    program = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['matmul', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert b"--sizes" in done.stdout
