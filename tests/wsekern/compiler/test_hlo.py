import pytest
from hlo_text import LOOP

from wsekern.compiler import hlo


@pytest.fixture(scope="module")
def program():
    return hlo.parse(LOOP)


def test_computations_have_their_instructions_in_order(program):
    assert set(program.computations) == {"fused", "body", "condition", "main"}
    assert [one.opcode for one in program.main.instructions] == [
        *("parameter", "parameter", "all-gather", "constant", "tuple", "while"),
        "get-tuple-element",
    ]
    assert program.main.root.name == "out"


def test_an_instruction_knows_shapes_operands_and_attributes(program):
    gather = program.main.by_name["gather"]
    assert [str(shape) for shape in gather.shapes] == ["f32[128,128]"]
    assert gather.bytes == 128 * 128 * 4
    assert gather.operands == ("b",)
    fusion = program.computations["body"].by_name["fusion"]
    assert fusion.cycles == 1_500_000 and fusion.operation == "jit(f)/while/body/dot_general"
    assert fusion.called == {"calls": "fused"}
    loop = program.main.by_name["loop"]
    assert loop.called == {"condition": "condition", "body": "body"}
    assert [str(shape) for shape in loop.shapes] == ["s32[]", "f32[8,128]", "f32[128,128]"]


def test_cycles_that_the_compiler_does_not_know_are_none():
    program = hlo.parse(LOOP.replace("1500000", str(2**63 - 1)))
    assert program.computations["body"].by_name["fusion"].cycles is None


def test_a_stack_frame_is_its_lines_from_the_innermost_outward(program):
    frames = program.frames[3]
    assert [(f.file.rpartition("/")[2], f.number) for f in frames] == [
        ("core.py", 9),
        ("model.py", 12),
        ("model.py", 40),
    ]


def test_a_line_break_in_the_metadata_of_a_kernel_ends_no_instruction():
    kernel = 'custom-call(%a), custom_call_target="tpu_custom_call"'
    text = (
        "ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {\n"
        "  %a = bf16[4,8]{1,0} parameter(0)\n"
        f"  ROOT %splash.1 = bf16[4,8]{{1,0}} {kernel}, frontend_attributes={{kernel_metadata={{\n"
        '"block": "{\\"q\\": 128}"\n'
        '}}, metadata={op_name="jit(f)/pallas_call" stack_frame_id=7}\n'
        "}\n"
    )
    call = hlo.parse(text).main.by_name["splash.1"]
    assert call.target == "tpu_custom_call" and call.operands == ("a",)
    assert call.operation == "jit(f)/pallas_call" and call.frame == 7


def test_formats_below_a_byte_count_as_parts_of_one():
    assert hlo.Shape("s4", (3, 2)).bytes == 3
    assert hlo.Shape("bf16", ()).bytes == 2


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule empty\n")
