"""The summary before a run: the drawing of the mesh, the facts, the peak."""

import io
import math
import re

import jax
import numpy as np
import pytest
from rich.console import Console as Terminal

import wsekern as wk
from models.families.llama import NANO
from sharding.state import named_leaves
from training.config import TrainingConfig
from training.data import Corpus
from training.header import Peak, find_peak, header, mesh_drawing
from training.plan import make_plan

PEAK = Peak(flops=2.5e12, source="a data sheet")
CORPUS = Corpus(
    train=np.zeros(900, np.uint8),
    validation=np.zeros(100, np.uint8),
    vocab=256,
    name="text.txt",
    alphabet=None,
    fingerprint="",
    skipped=(),
)


def as_text(renderable):
    output = io.StringIO()
    Terminal(file=output, width=200).print(renderable)
    return output.getvalue()


def test_the_mesh_is_drawn_with_the_numbers_of_its_devices():
    wafer = wk.Wafer.devices(2, 4)
    rows = [line for line in as_text(mesh_drawing(wafer)).splitlines() if line.startswith("│")]
    numbers = [[int(cell) for cell in row.strip("│").split("│")] for row in rows]
    assert numbers == [[device.id for device in row] for row in wafer.device_mesh.devices]


def test_the_middle_of_a_large_grid_is_left_out():
    picture = as_text(mesh_drawing(wk.Wafer.virtual(wk.WSE2, 720, 750)))
    assert "0,0" in picture and "719,749" in picture and "..." in picture
    assert "6,0" not in picture and len(picture.splitlines()) == 13


@pytest.mark.parametrize("virtual", [False, True])
def test_the_facts_of_a_run(virtual):
    config = TrainingConfig(batch=4, context=16)
    wafer = wk.Wafer.virtual(wk.WSE3, 2, 4) if virtual else wk.Wafer.devices(2, 4)
    plan = make_plan(config, NANO, wafer)
    text = as_text(header(plan, CORPUS, PEAK))
    words = sum(leaf.size for leaf in named_leaves(plan.shapes["params"]).values())
    assert f"nano: {words:,} parameters" in text
    assert "4 x 16 = 64 tokens" in text
    assert "2.5 TFLOP/s (a data sheet)" in text
    assert ("virtual, on one cpu" if virtual else "emulated on this CPU") in text


@pytest.mark.parametrize(
    "wafer", [wk.Wafer.devices(2, 4), wk.Wafer.virtual(wk.WSE3, 10, 10)], ids=repr
)
def test_the_state_is_counted_in_bytes_of_one_device(wafer):
    plan = make_plan(TrainingConfig(), NANO, wafer)
    words = sum(math.prod(s.sharding.shard_shape(s.shape)) for s in jax.tree.leaves(plan.shapes))
    text = as_text(header(plan, CORPUS, PEAK))
    assert re.search(rf"state +{words * 4 / 1e6:,.1f} MB on (a|one) device", text)


def test_an_unknown_device_is_measured_and_a_known_one_looked_up(monkeypatch):
    measured = find_peak(wk.Wafer.devices(1, 2), "float32")
    assert measured.flops > 1e8 and "measured" in measured.source
    monkeypatch.setattr("training.header.accelerator", lambda kind: wk.H100)
    rated = find_peak(wk.Wafer.devices(1, 2), "bfloat16")
    assert rated.flops == 2 * wk.H100.bfloat16_flops
    assert rated.source == "2 x H100 SXM"
