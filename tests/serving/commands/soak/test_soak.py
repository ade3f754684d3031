"""A soak: what it sends, what it counts, and what it makes of a server that fails."""

import asyncio
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading

import jax
import pytest
from flax import nnx

import models
from models.config import DecoderConfig
from serving.__main__ import main
from serving.commands.http_client import HttpClient
from serving.commands.soak import run as soak_run
from serving.commands.soak.kinds import Asker, Shot
from serving.commands.soak.load import Load
from serving.commands.soak.process import Holdings, look_at
from serving.commands.soak.verdict import Sample, check_files, check_held, check_memory

MB = 1 << 20
PROGRAM = """
import sys
sys.path.insert(0, "tests")
from scripted_engine import ScriptedEngine, build_server
server = build_server(ScriptedEngine(lambda prompt, params: b"x" * 20))
print(server.url, flush=True)
sys.exit(server.run())
"""
CONFIG = DecoderConfig(
    vocab=256, d_model=32, d_ff=64, layers=1, heads=2, kv_heads=1, context=512, tied=True
)


@pytest.fixture
def soak(server, tmp_path, capsys):
    """Soaks the scripted server; the exit status, the output, and what was written as JSON."""

    def run(*flags, url=None, pid=None):
        file = tmp_path / "verdict.json"
        argv = ["soak", "--url", url or server.url, "--pid", str(pid or os.getpid())]
        status = main([*argv, "--concurrency", "4", "--json", str(file), *flags])
        return status, capsys.readouterr().out, json.loads(file.read_text())

    return run


def goodness(found):
    return {check["name"]: check["is_good"] for check in found["checks"]}


def test_every_kind_is_answered_as_it_must_be(soak, engine):
    status, out, found = soak("--minutes", "9", "--requests", "120")
    good = goodness(found)
    assert good.pop("memory") == (status == 0)  # of the process that runs the tests
    assert good == {"file descriptors": True, "held when idle": True, "answers": True}
    assert found["failures"] == {} and set(found["outcomes"]) == set(Asker("m", 4096).kinds)
    assert set(found["outcomes"]["bad input"]) == {"refused"}
    assert found["outcomes"]["chat"]["answered"] > 0
    assert found["samples"] and "scripted at http://127.0.0.1:" in out
    assert "120 requests in at most 9 minutes of 4 clients" in out
    assert sum(sum(counts.values()) for counts in found["outcomes"].values()) == 120
    params = [params for _, params in engine.asked]
    assert any(one.matcher is not None for one in params)
    assert any(one.temperature > 0 for one in params)
    assert any(len(prompt) > 2000 for prompt, _ in engine.asked)


def test_every_bad_request_is_refused(server):
    asker, rng = Asker("scripted", 4096), random.Random(0)
    shots = [asker.make("bad input", rng) for _ in range(200)]

    async def send():
        client = HttpClient(server.url)
        load = Load(client, asker)
        different = {repr(shot): shot for shot in shots}
        outcomes = {key: await load._outcome(shot) for key, shot in different.items()}
        client.close()
        return outcomes

    outcomes = asyncio.run(send())
    assert len(outcomes) > 20 and set(outcomes.values()) == {"refused"}


def test_a_server_that_fails_is_found_out(soak, engine):
    engine.error, engine.error_after = "the logits are NaN", 1
    status, out, found = soak("--minutes", "0.01")
    assert status == 1 and not goodness(found)["answers"]
    assert any("chat: 500 generation_failed" in failure for failure in found["failures"])
    assert "BAD  answers: " in out and "the server did not stay as it was" in out


def test_what_is_held_is_found_out(soak, engine, monkeypatch):
    monkeypatch.setattr(soak_run, "_IDLE", 0.1)
    snapshot = engine.snapshot
    monkeypatch.setattr(
        engine, "snapshot", lambda: snapshot().__class__(slots=(), pages_free=60, pages_held=3)
    )
    status, out, _ = soak("--minutes", "0.01")
    assert status == 1
    assert "BAD  held when idle: 0 slots, 0 waiting, 3 pages held, 1 pages missing" in out


def test_a_wrong_answer_counts_as_a_failure(server, monkeypatch):
    async def send(shot):
        client = HttpClient(server.url)
        asker = Asker("scripted", 4096)
        monkeypatch.setattr(asker, "make", lambda kind, rng: shot)
        load = Load(client, asker)
        await load._send("kind", random.Random(0))
        client.close()
        return load

    body = {"model": "scripted", "prompt": "a"}
    load = asyncio.run(send(Shot("/v1/completions", body, is_good=False)))
    assert load.failures == {"kind: answered, although it is wrong": 1}
    load = asyncio.run(send(Shot("/v1/completions", body | {"n": 0})))
    assert load.outcomes == {("kind", "failed"): 1} and "kind: 400" in next(iter(load.failures))


def test_clients_that_leave_free_their_slots(server, engine):
    engine.pause = 0.05
    shot = Shot("/v1/completions", {"model": "scripted", "prompt": "a"}, leaves_after=0.1)

    async def send():
        client = HttpClient(server.url)
        assert await Load(client, Asker("scripted", 4096))._outcome(shot) == "left"
        while engine.running:
            await asyncio.sleep(0.01)
        client.close()

    asyncio.run(send())
    assert len(engine.asked) == 1


@pytest.mark.slow
def test_a_server_that_dies_is_found_out(soak):
    root = pathlib.Path(__file__).parents[4]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            held = look_at(process.pid)
            assert held.files > 3 and held.memory > 10 * MB and held.processes == 1
            killer = threading.Timer(1.0, process.kill)
            killer.start()
            status, out, found = soak("--minutes", "1", url=url, pid=process.pid)
            killer.join()
        finally:
            process.kill()
    assert status == 1 and goodness(found) == {"process": False}
    assert f"BAD  process: there is no process {process.pid}" in out
    with pytest.raises(ProcessLookupError):
        look_at(process.pid)


@pytest.mark.slow
def test_a_server_is_started_and_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models.save(jax.jit(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(0)))(), tmp_path / "tiny")
    argv = ["soak", "--model", str(tmp_path / "tiny"), "--minutes", "0.05", "--concurrency", "8"]
    argv += ["--server-flags=--max-streams 4 --platform cpu", "--log", str(tmp_path / "log")]
    main([*argv, "--json", str(tmp_path / "verdict.json")])
    found = json.loads((tmp_path / "verdict.json").read_text())
    good = goodness(found)
    good.pop("memory")  # seconds are too short for a verdict on it
    assert found["failures"] == {} and len(good) == 4 and all(good.values()), found["checks"]
    assert "status 0 after SIGTERM" in capsys.readouterr().out
    assert '"event": "ended"' in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_ends_the_load_and_reports(server):
    argv = [sys.executable, "-m", "serving", "soak", "--url", server.url, "--pid", str(os.getpid())]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("scripted at ")
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
    assert process.returncode == 130
    assert "held when idle: 0 slots" in out and out.endswith("before the time was over\n")


def samples_of(memory):
    return [
        Sample(
            time=float(time),
            holdings=Holdings(memory=int(bytes_), files=9, threads=3, processes=1),
            requests=10 * time,
        )
        for time, bytes_ in enumerate(memory)
    ]


def test_memory_that_grows_after_the_first_quarter_is_found_out():
    rng = random.Random(0)
    noise = [rng.uniform(-MB, MB) for _ in range(400)]
    filling = [400 * MB - 3 * MB * max(0, 90 - time) for time in range(400)]
    flat = check_memory(samples_of(map(sum, zip(filling, noise, strict=True))))
    assert flat.is_good and "MB a minute" in flat.found
    leaking = [400 * MB + 0.1 * MB * time for time in range(400)]
    leak = check_memory(samples_of(map(sum, zip(leaking, noise, strict=True))))
    assert not leak.is_good and "slope +6." in leak.found  # 0.1 MiB a second
    assert check_memory(samples_of([400 * MB])).is_good


def test_file_descriptors_and_slots_are_compared_with_the_beginning():
    begin = Holdings(memory=0, files=10, threads=1, processes=1)
    busy = Holdings(memory=0, files=50, threads=1, processes=1)
    assert check_files(begin, begin, samples_of([1])).is_good
    assert not check_files(begin, busy).is_good
    idle = {"slots": [], "waiting": 0, "pages_held": 0, "pages_total": 9, "pages_free": 4}
    assert check_held([idle | {"pages_evictable": 5}]).is_good
    assert not check_held([idle | {"pages_evictable": 5}, idle | {"pages_evictable": 4}]).is_good


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either model, for a server that is started, or url"),
        (["--url", "http://a"], "url and pid belong together"),
        (["--model", "a", "--minutes", "0"], "minutes=0.0 must be positive"),
        (["--model", "a", "--concurrency", "0"], "concurrency=0 must be 1 or more"),
        (["--model", "a", "--requests", "0"], "requests=0 must be 1 or more"),
    ],
)
def test_refuses_arguments(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["soak", *flags])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "the server ended with status 2 before it was ready"),
        (["--url", "http://127.0.0.1:9", "--pid", "1"], "no server answers"),
        (["--url", "{plain}", "--pid", "1"], "is no server of `python -m serving`"),
        (["--url", "{server}", "--pid", "1", "--name", "x"], "name='x' is none of the server's"),
        (["--url", "{server}", "--pid", "999999999"], "there is no process 999999999 in /proc"),
    ],
)
def test_refuses(flags, message, server, plain_server, capsys):
    places = {"plain": plain_server.url, "server": server.url}
    assert main(["soak", *(flag.format(**places) for flag in flags)]) == 2
    assert message in capsys.readouterr().err
