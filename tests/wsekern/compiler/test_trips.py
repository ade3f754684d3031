import pytest
from hlo_text import LOOP

from wsekern.compiler import hlo
from wsekern.compiler.trips import trip_count


def trips(text):
    program = hlo.parse(text)
    (loop,) = [one for one in program.main.instructions if one.opcode == "while"]
    return trip_count(program, program.main, loop)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", 4),
        ("constant(4)", "constant(0)", 0),
        ("constant(4)", "constant(7)", 7),
        ("direction=LT", "direction=LE", 5),
        ("%zero = s32[] constant(0)", "%zero = s32[] constant(-2)", 6),
        ("%one = s32[] constant(1)", "%one = s32[] constant(3)", 2),
        ("constant(4)", "constant(1000000)", 1_000_000),
        # The compiler wrote it down.
        ("body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"9"}},', 9),
        # A bound that arrives with the data, a counter that a trip does not change.
        ("%bound = s32[] constant(4)", "%bound = s32[] custom-call()", None),
        ("%one = s32[] constant(1)", "%one = s32[] constant(0)", None),
        ("%zero = s32[] constant(0)", "%zero = s32[] custom-call()", None),
    ],
)
def test_the_trips_of_a_loop_follow_from_start_step_and_bound(old, new, expected):
    assert not old or old in LOOP
    assert trips(LOOP.replace(old, new) if old else LOOP) == expected


def test_a_condition_inside_a_fusion_is_read():
    compare = "ROOT %lt = pred[] compare(%i.1, %bound), direction=LT\n}"
    fused = "ROOT %lt = pred[] fusion(%i.1, %bound), kind=kLoop, calls=%less\n}"
    less = (
        "%less (q0: s32[], q1: s32[]) -> pred[] {\n  %q0 = s32[] parameter(0)\n"
        "  %q1 = s32[] parameter(1)\n"
        "  ROOT %c = pred[] compare(%q0, %q1), direction=LT\n}\n\n"
    )
    text = LOOP.replace(compare, fused).replace("%condition (p.1", less + "%condition (p.1")
    assert trips(text) == 4
