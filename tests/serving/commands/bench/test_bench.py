"""A bench before scripted servers: what it sends, counts, reports and writes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from serving.__main__ import main


@pytest.fixture
def bench(server, tmp_path):
    """Runs a bench; its exit status, and what it wrote as JSON."""

    def run(*flags, url=None):
        file = tmp_path / "figures.json"
        file.unlink(missing_ok=True)
        argv = ["bench", "--url", url or server.url, "--json", str(file), *flags]
        status = main(argv)
        return status, json.loads(file.read_text()) if file.exists() else None

    return run


def test_each_level_is_measured_and_counted_by_the_server(bench, engine, capsys):
    flags = "--concurrency 1 4 --requests 8 --prompt-tokens 100-140 --max-tokens 5-9"
    status, found = bench(*flags.split())
    assert status == 0
    asked = engine.asked[2:]  # after two probes
    assert len(asked) == 16 and len({bytes(prompt) for prompt, _ in asked}) == 16
    assert {params.max_tokens for _, params in asked} <= set(range(5, 10))
    assert all(params.min_tokens == params.max_tokens for _, params in asked)
    assert found["model"] == "scripted" and found["notes"] == []
    for level, some in zip(found["levels"], (asked[:8], asked[8:]), strict=True):
        assert level["tokens"] == sum(params.max_tokens for _, params in some)
        assert level["prompt_tokens"] == sum(len(prompt) for prompt, _ in some)
        assert 90 <= level["prompt_tokens"] / 8 <= 150 and level["is_counted"]
        assert level["requests"] == 8 and level["failures"] == {}
        for one in level["timings"]:
            assert one["due"] <= one["sent"] < one["first"] <= one["last"] <= one["ended"]
        assert level["latency"]["median"] <= level["latency"]["p90"] <= level["latency"]["p99"]
        assert level["tokens_per_second"] == pytest.approx(level["tokens"] / level["seconds"])
    output = capsys.readouterr().out
    (concurrency,) = [line for line in output.splitlines() if line.strip().startswith("conc")]
    assert concurrency.split() == ["concurrency", "1", "4"]
    assert "lateness" not in output


def test_completions_and_prompts_of_a_file(bench, engine, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    flags = ["--endpoint", "completions", "--prompts", str(tmp_path / "prompts.txt")]
    status, _ = bench(*flags, "--concurrency", "1", "--requests", "3", "--max-tokens", "2")
    assert status == 0
    assert [bytes(prompt) for prompt, _ in engine.asked[2:]] == [b"one", b"two", b"one"]


def test_arrivals_are_random_in_time_and_the_same_for_a_seed(bench):
    flags = "--rate 100 --requests 12 --max-tokens 2".split()
    dues = []
    for seed in ("1", "1", "2"):
        status, found = bench(*flags, "--seed", seed)
        (level,) = found["levels"]
        assert status == 0 and level["concurrency"] == 12
        assert all(one["sent"] >= one["due"] for one in level["timings"])
        dues.append(sorted(one["due"] for one in level["timings"]))
    assert dues[0] == dues[1] != dues[2]
    assert dues[0][0] == 0 and len(set(dues[0])) == 12


def test_prompts_are_others_in_each_run_unless_a_seed_is_given(bench, engine):
    seeds = []
    for flags in ([], [], ["--seed", "3"], ["--seed", "3"]):
        status, found = bench("--requests", "2", "--concurrency", "1", *flags)
        assert status == 0
        seeds.append(found["command"]["seed"])
    runs = [[bytes(prompt) for prompt, _ in engine.asked[n : n + 4]] for n in range(0, 16, 4)]
    assert seeds[0] != seeds[1] and not set(runs[0]) & set(runs[1])
    assert seeds[2:] == [3, 3] and runs[2] == runs[3]


def test_failures_are_counted_by_kind(bench, engine, capsys):
    engine.error, engine.error_after = "the logits are NaN", 6  # probes make four tokens
    status, found = bench("--requests", "3", "--concurrency", "2", "--max-tokens", "8")
    assert status == 1
    (level,) = found["levels"]
    assert level["failures"] == {"500 generation_failed": 3} and level["latency"] is None
    assert "concurrency 2: 3 failed: 500 generation_failed" in capsys.readouterr().out


def test_a_server_of_the_least_of_the_api(bench, plain_server, capsys):
    flags = ["--requests", "2", "--concurrency", "1", "--body", '{"ignore_eos": true}']
    status, found = bench(*flags, url=plain_server.url)
    assert status == 0
    assert "min_tokens" not in plain_server.bodies[-1] and plain_server.bodies[-1]["ignore_eos"]
    (level,) = found["levels"]
    assert level["tokens"] == 6 and not level["is_counted"] and level["prompt_tokens"] is None
    printed = capsys.readouterr().out
    for words in ("prompts may be longer", "no min_tokens", "events with text are counted"):
        assert words in " ".join(found["notes"]) and words in printed
    plain_server.cuts = True
    assert bench(*flags, url=plain_server.url)[0] == 2  # the probe already
    assert "the stream ended before the answer did" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_plot(bench, tmp_path, ending):
    file = tmp_path / f"plot.{ending}"
    flags = ["--requests", "2", "--concurrency", "1", "2", "--max-tokens", "3"]
    assert bench(*flags, "--plot", str(file))[0] == 0
    text = file.read_text()
    assert "<svg" in text and "first token, ms" in text
    assert ("<table>" in text) == (ending == "html")


def test_ctrl_c_reports_what_there_is(server, engine):
    engine.pause = 0.02
    argv = [sys.executable, "-m", "serving", "bench", "--url", server.url, "--concurrency", "1"]
    process = subprocess.Popen(
        [*argv, "--requests", "1000", "--max-tokens", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    try:
        while len(engine.asked) < 6:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and error == "interrupted; so far:\n"
    requests = next(line for line in out.splitlines() if line.strip().startswith("requests"))
    assert 3 <= int(requests.split()[1]) < 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "0"], "concurrency=0 must be 1 or more"),
        (["--requests", "0"], "requests=0 must be 1 or more"),
        (["--rate", "0"], "rate=0.0 must be positive"),
        (["--timeout", "nan"], "timeout=nan must be positive"),
        (["--prompt-tokens", "9-3"], "prompt_tokens='9-3' must be a number, or a range"),
        (["--max-tokens", "many"], "max_tokens='many' must be a number, or a range"),
        (["--body", "["], "body is not valid JSON"),
        (["--plot", "a.gif"], "must end in .svg or .png or .pdf or .html"),
    ],
)
def test_refuses_arguments(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *flags])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "/nowhere/a.json"], "there is no folder '/nowhere'"),
        (["--prompts", "/nowhere"], "/nowhere: No such file or directory"),
        (["--prompts", os.devnull], "has no line"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9: Connection"),
        (["--url", "nowhere"], "url='nowhere' must be like http://"),
        (["--model", "other"], "the server refuses a request: 404: Model other does not exist"),
    ],
)
def test_refuses(flags, message, server, capsys):
    url = [] if "--url" in flags else ["--url", server.url]
    assert main(["bench", *url, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m serving bench: error: ") and message in line
