"""What the compiler of TPUs writes about a program; these files are made by hand."""

import pytest

import wsekern as wk
from wsekern.compiler.dump import arrays_at_peak, dump_folder, scheduled_text

RANGES = """HloLiveRange (max 9):
  BufferLiveRange:
    a{}:0-9
  Live ranges at 5 (peak):
    fusion.5{}: 4096 bytes (cumulative: 4096 bytes)
    pair{1}: 2048 bytes (cumulative: 6144 bytes)
    q{}: 1024 bytes (cumulative: 7168 bytes)
    a{}: 512 bytes (cumulative: 7680 bytes)
    gone{}: 256 bytes (cumulative: 7936 bytes)
  Stack trace breakdown for peak usage: 7 936 bytes
    a{}: 1 bytes (cumulative: 1 bytes)
"""
PROGRAM = """HloModule m

FileNames
1 "model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%body (q: f32[256]) -> f32[256] {
  ROOT %q = f32[256]{0} parameter(0)
}

ENTRY %main (a: f32[128]) -> f32[1024] {
  %a = f32[128]{0} parameter(0)
  %pair = (f32[8]{0}, bf16[1024]{0}) fusion(%a), kind=kLoop, calls=%body
  ROOT %fusion.5 = f32[1024]{0} fusion(%pair), metadata={op_name="jit(f)/sub" stack_frame_id=1}
}
"""


def line_of(frames):
    return next((f"{frame.file}:{frame.number}" for frame in frames), "")


def test_arrays_at_the_peak_have_bytes_shape_operation_and_line(tmp_path):
    (tmp_path / "module_0.jit_f.after_optimizations-live-range.txt").write_text(RANGES)
    (tmp_path / "module_0.jit_f.oom_intermediate_module.txt").write_text(PROGRAM)
    assert [tuple(array) for array in arrays_at_peak(tmp_path, line_of)] == [
        (4096, (1024,), "f32", "sub", "model.py:12"),
        (2048, (1024,), "bf16", "fusion", ""),
        (1024, (256,), "f32", "carried by a loop", ""),
        (512, (128,), "f32", "argument", ""),
    ]


def test_a_compiler_that_wrote_nothing_says_nothing(tmp_path):
    assert arrays_at_peak(tmp_path, line_of) == arrays_at_peak(None, line_of) == ()
    assert scheduled_text(tmp_path) == scheduled_text(None) == ""


def test_of_several_files_the_longest_is_the_program(tmp_path):
    (tmp_path / "module_0.jit_helper.after_codegen.txt").write_text("short")
    (tmp_path / "module_1.jit_step.after_codegen.txt").write_text("longer than it")
    assert scheduled_text(tmp_path) == "longer than it"


@pytest.mark.parametrize("end", ["as it should", "with an error"])
def test_the_folder_is_gone_at_the_end(end, monkeypatch):
    wafer = wk.Wafer.devices(1, 1)
    monkeypatch.setattr(type(wafer), "platform", "tpu")
    try:
        with dump_folder(wafer) as (folder, options):
            assert folder is not None and folder.is_dir() and options["xla_dump_to"] == str(folder)
            if end == "with an error":
                raise RuntimeError
    except RuntimeError:
        pass
    assert folder is not None and not folder.exists()


def test_other_chips_write_nothing():
    with dump_folder(wk.Wafer.devices(1, 1)) as given:
        assert given == (None, {})
