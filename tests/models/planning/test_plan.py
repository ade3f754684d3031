"""Plans of models on wafers: regions, memory, streaming, and the reports."""

import dataclasses
import json
from typing import Any

import pytest

import wsekern as wk
from models.__main__ import main
from models.planning import memory, regions
from models.planning.chips import chips_of
from models.planning.parts import parts_of
from models.planning.plan import plan, scale_out
from models.presets import find_preset

SMALL = dataclasses.replace(find_preset("llama3.2-1b"), layers=4, vocab=4096)
SPARSE = dataclasses.replace(find_preset("gpt-oss-20b"), layers=4, windows=(128, None) * 2)


def plan_small(config=SMALL, **options: Any):
    defaults: dict[str, Any] = {"mode": "decode", "machine": wk.WSE2, "side": 248, "context": 1024}
    return plan(config, name="small", parameters=10**9, **defaults | options)


@pytest.mark.parametrize("machine", [wk.WSE1, wk.WSE2, wk.WSE3])
def test_regions_lie_on_the_wafer_side_by_side(machine):
    candidates = regions.candidates(machine)
    assert candidates[0].side >= 595
    for r in candidates:
        assert r.down * r.side <= machine.usable_height
        assert r.across * r.side <= machine.usable_width
    assert max(r.count * r.side**2 for r in candidates) > 0.95 * machine.usable_pes


def test_weights_stay_if_there_is_room_and_are_streamed_if_not():
    small = plan_small()
    assert small.resident and small.seconds == small.compute_seconds
    assert small.wafers_needed == 1 and small.tokens == 1
    # 2 bytes a parameter of a layer, spread over the region's PEs; padding makes it more
    one = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192) * 2 / 248**2
    assert small.parts[0].weights == pytest.approx(one, rel=0.3) and small.parts[0].weights > one
    assert sum(small.sram.values()) <= memory.capacity(wk.WSE2)
    deep = plan_small(dataclasses.replace(SMALL, layers=400))
    assert not deep.resident and deep.fewest_wafers == deep.wafers_needed > 1
    assert deep.seconds == deep.stream_seconds > deep.compute_seconds
    assert sum(deep.sram.values()) == memory.capacity(wk.WSE2)
    whole = 400 * deep.parts[0].weights * 248**2
    assert 0.5 * whole < deep.streamed_bytes < whole
    enough = plan_small(dataclasses.replace(SMALL, layers=400), wafers=deep.wafers_needed)
    assert enough.resident and enough.seconds == pytest.approx(100 * small.seconds, rel=0.2)


def test_layers_that_are_alike_are_one_part_and_experts_count_by_choice():
    narrow, whole, head = parts_of(SPARSE, "decode", wk.WSE3, 250, 1024, 1)
    assert (narrow.count, whole.count, head.count) == (2, 2, 1)
    assert narrow.cache < whole.cache and narrow.cycles < whole.cycles
    assert narrow.met == pytest.approx(4 / 32)
    assert SPARSE.experts is not None
    wide = dataclasses.replace(SPARSE, experts=dataclasses.replace(SPARSE.experts, count=64))
    more = parts_of(wide, "decode", wk.WSE3, 250, 1024, 1)[0]
    assert more.cycles == narrow.cycles and more.weights > 1.8 * narrow.weights


def test_caches_that_do_not_fit_are_refused():
    """Weights can be streamed; the caches of all layers have to stay."""
    deep = dataclasses.replace(SMALL, layers=400)
    with pytest.raises(ValueError, match="a PE lacks .* batch=[0-9]+ fits"):
        plan_small(deep, batch=64)


def test_training_streams_its_weights_and_scales_with_wafers():
    p = plan_small(mode="train", wafers=4, context=256)
    assert p.compute_seconds >= p.stream_seconds  # of the batch that it chose
    assert p.batch % (4 * p.regions.count) == 0
    steps = scale_out(p)
    assert [n for n, _, _ in steps] == [1, 2, 4]
    assert steps[0][1] == pytest.approx(4 * p.compute_seconds)
    few = plan_small(mode="train", wafers=4, context=256, batch=1)
    assert few.seconds == few.stream_seconds and scale_out(few)[-1][2] < 0.5


def test_a_prompt_takes_longer_than_a_token_and_prompts_follow_one_another():
    prompt = plan_small(mode="prefill", context=512)
    assert prompt.seconds > plan_small(context=512).seconds and prompt.tokens == 512
    two = plan_small(mode="prefill", context=512, batch=2)
    assert prompt.seconds < two.seconds <= 2 * prompt.seconds


def test_chips_read_their_weights_once_a_token():
    chips = chips_of(SMALL, 10**9, "decode", wk.A100, 1024, 1)
    cache = 4 * 2 * 2 * 1024 * 512
    assert chips.count == 1
    launches = (5 * SMALL.layers + 1) * 0.5e-6
    assert chips.seconds == pytest.approx((2e9 + cache) / 2.039e12 + launches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wafers": 0}, "wafers=0 must be from 1 to 2,048"),
        ({"context": 10**7}, "context=10000000 must be from 1 to 131,072"),
        ({"batch": 0}, "batch=0 must be from 1 to"),
        ({"side": 900}, "side=900: a square region of WSE-2 has from 1 to 750"),
        ({"mode": "train", "side": 64}, "a PE lacks .* bytes for train of 1,024 tokens"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        plan_small(**options)


def test_the_command_writes_a_page(tmp_path, capsys):
    page = tmp_path / "plan.html"
    command = ["plan", "cerebras-gpt-111m", "--machine", "andromeda", "--mode", "train"]
    command += ["--context", "256", "--side", "250", "--html", str(page)]
    assert main(command) == 0
    text = page.read_text()
    assert "<svg" in text and "cerebras-gpt-111m on 16 x CS-2" in text and "src=" not in text
    assert main([*command[:-1], str(tmp_path / "none" / "plan.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_command_prints_tables_or_json(capsys):
    command = ["plan", "cerebras-gpt-111m", "--machine", "cs-2", "--side", "250"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "resident" in out and "memory of a PE" in out
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["wafers_needed"] == 1 and plan["tokens_per_second"] > 1000
    assert main(["plan", "llama3-8b", "--machine", "h100", "--wafers", "2"]) == 0
    assert "2 x H100" in capsys.readouterr().out


def test_andromeda_is_sixteen_wafers(capsys):
    command = ["plan", "cerebras-gpt-111m", "--machine", "andromeda", "--mode", "train"]
    assert main([*command, "--side", "250", "--context", "512", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["wafers"] == 16 and plan["scaling"][-1][0] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lama3-8b"], "did you mean 'llama3-8b'"),
        (["llama3-8b", "--machine", "wse-4"], "did you mean 'WSE-3'"),
        (["llama3-8b", "--machine", "andromedia"], "did you mean 'andromeda'"),
        (["llama3-8b", "--machine", "h100", "--side", "250"], "side is for wafers, and H100"),
    ],
)
def test_the_command_refuses_and_suggests(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["clock", "batch", "context", "wafers", "side"])
def test_a_number_out_of_range_is_refused_by_its_flag(flag, capsys):
    nonsense = ["inf", "-1", "nan", "0", "1e300"] if flag == "clock" else ["-1", "0", "9" * 20]
    machines = ["cs-3", "andromeda"] + ["h100"] * (flag not in ("clock", "side"))
    for value in nonsense:
        for machine in machines:
            for mode in ("decode", "prefill", "train"):
                words = ["nano", "--machine", machine, "--mode", mode, f"--{flag}", value]
                assert main(["plan", *words]) == 2
                [line] = capsys.readouterr().err.splitlines()
                assert f"{flag}=" in line


def test_a_clock_out_of_range_is_refused():
    for clock_hz in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="clock_hz=.* must be a number from 1 to 1e12"):
            plan_small(clock_hz=clock_hz)
