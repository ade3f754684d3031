"""Figures of the machines, and the programs and dtypes that they refuse."""

import dataclasses
from typing import Any

import pytest

from wsekern import hardware
from wsekern.hardware import (
    A100,
    H100,
    H200,
    MACHINES,
    TPU_7X,
    TPU_V5E,
    TPU_V5P,
    TPU_V6E,
    WSE1,
    WSE2,
    WSE3,
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_figures_of_a_machine_agree_with_one_another(machine):
    assert machine.usable_height <= machine.grid_height
    assert machine.usable_width <= machine.grid_width
    assert machine.usable_pes == machine.usable_height * machine.usable_width
    assert machine.fmacs_per_cycle("bfloat16") == machine.fmacs_per_cycle("float16")
    assert machine.fmacs_per_cycle("float16") > machine.fmacs_per_cycle("float32")
    # A fused multiply-add a cycle reads two float32 operands and writes one.
    assert machine.read_bytes_per_cycle >= 2 * 4 * machine.fmacs_float32
    assert machine.write_bytes_per_cycle >= 4 * machine.fmacs_float32


def test_memory_of_a_wafer_is_what_is_published():
    # 40 GB and 44 GB, of which a program has what its rectangle holds.
    assert WSE2.usable_pes * WSE2.sram_bytes == pytest.approx(40e9, rel=0.1)
    assert WSE3.usable_pes * WSE3.sram_bytes == pytest.approx(44e9, rel=0.02)


@pytest.mark.parametrize(
    ("machine", "dtype", "clock", "flops"),
    [
        # PEs x FLOPs a cycle x cycles a second
        (WSE1, "float16", None, 600 * 595 * 8 * 0.85e9),
        (WSE2, "float32", None, 1.26735e15),
        (WSE2, "bfloat16", None, 5.0694e15),
        (WSE2, "float16", 1.1e9, 745_500 * 8 * 1.1e9),
        (WSE3, "float32", 1e9, 883_350 * 2 * 1e9),
        (WSE3, "float16", 1e9, 883_350 * 16 * 1e9),
    ],
)
def test_peak_is_two_flops_a_lane_a_cycle(machine, dtype, clock, flops):
    assert machine.peak_flops(dtype, clock) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("ask", [WSE2.fmacs_per_cycle, WSE3.peak_flops])
def test_refuses_a_dtype_without_a_figure(ask):
    with pytest.raises(ValueError, match="no figure for dtype='int8', only for .*'float32'"):
        ask("int8")


@pytest.mark.parametrize("side", ["usable_height", "usable_width"])
def test_refuses_a_program_larger_than_the_wafer(side):
    changes: dict[str, Any] = {side: 1000}
    with pytest.raises(ValueError, match="Machine WSE-2: the usable .* is larger than its grid"):
        dataclasses.replace(WSE2, **changes)


@pytest.mark.parametrize(
    ("device_kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", A100),
        ("TPU v5 lite", TPU_V5E),
        ("TPU v5", TPU_V5P),
        ("TPU v6 lite", TPU_V6E),
        ("TPU7x", TPU_7X),
        ("TPU v4", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_an_accelerator_is_found_by_what_jax_calls_it(device_kind, chip):
    assert hardware.accelerator(device_kind) is chip
