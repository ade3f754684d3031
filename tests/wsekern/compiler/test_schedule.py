import dataclasses

import pytest
from hlo_text import LOOP

from wsekern.compiler import hlo
from wsekern.compiler.mesh_axes import MeshAxes
from wsekern.compiler.schedule import Key, price
from wsekern.hardware import H100, TPU_V5E

MESH = MeshAxes(("y", "x"), (2, 2), (False, False))
TILE, GATHERED = 8 * 128 * 4, 64 * 128 * 4  # bytes


def line_of(frames):
    return next((f"{f.file.rpartition('/')[2]}:{f.number}" for f in frames), "")


def cost(text=LOOP, chip=TPU_V5E, mesh=MESH, **options):
    return price(hlo.parse(text), mesh, chip, line_of, **options)


def test_cycles_are_multiplied_by_trips():
    assert cost().cycles == 4 * 1_500_000
    assert cost().fusion_seconds == pytest.approx(4e-3)


def test_a_move_behind_a_longer_product_is_hidden_and_a_synchronous_gather_is_waited_for():
    sent = cost().sent
    move, gather = sent[Key("collective-permute", ("x",))], sent[Key("all-gather", ("y",))]
    assert (move.count, move.bytes, move.waited_bytes) == (4, 4 * TILE, 0)
    assert (gather.count, gather.bytes, gather.waited_bytes) == (1, GATHERED, GATHERED)
    assert cost().waited_seconds == pytest.approx(GATHERED / 50e9)


def test_of_a_move_behind_a_shorter_product_the_rest_is_waited_for():
    half = TILE / 50e9 / 2
    text = LOOP.replace("1500000", str(round(half * 1.5e9)))
    move = cost(text).sent[Key("collective-permute", ("x",))]
    assert move.waited_bytes == pytest.approx(4 * TILE / 2, rel=0.02)


def test_two_moves_in_one_direction_of_an_axis_take_turns_and_in_both_do_not():
    begin = LOOP.index("  %start = ")
    line = LOOP[begin : LOOP.index("\n", begin) + 1]
    one_way = "{{0,1},{1,0},{2,3},{3,2}}", "{{0,1},{2,3}}"
    first = line.replace(*one_way)
    again = first.replace("%start", "%second")
    back = again.replace(one_way[1], "{{1,0},{3,2}}")
    done = "  %done2 = f32[8,128]{1,0} collective-permute-done(%second)\n  ROOT %t"
    quick = LOOP.replace("1500000", "0").replace("  ROOT %t", done)
    turns, both = (cost(quick.replace(line, first + second)) for second in (again, back))
    both_waited, turns_waited = (
        c.sent[Key("collective-permute", ("x",))].waited_seconds for c in (both, turns)
    )
    assert both_waited == pytest.approx(4 * TILE / 50e9)
    assert turns_waited == pytest.approx(2 * both_waited)


def test_an_axis_that_closes_to_a_ring_gathers_twice_as_fast():
    rings = dataclasses.replace(MESH, rings=(True, True))
    assert cost(mesh=rings).waited_seconds == pytest.approx(cost().waited_seconds / 2)


def test_a_loop_without_a_known_count_is_counted_once_and_named():
    unknown = cost(LOOP.replace("%bound = s32[] constant(4)", "%bound = s32[] custom-call()"))
    assert unknown.cycles == 1_500_000
    assert [(p.operation, p.line) for p in unknown.unknown_loops] == [("while", "model.py:12")]


def test_times_stand_by_operation_and_line_the_partitioners_own_by_their_readers():
    places = {(p.operation, p.line): seconds for p, seconds in cost().places.items()}
    assert places["dot_general", "core.py:9"] == pytest.approx(4e-3)
    assert places["all-gather", "model.py:12"] == pytest.approx(GATHERED / 50e9)


def test_a_chip_whose_compiler_counts_no_cycles_is_priced_by_flops_and_bytes():
    gpu = cost(chip=H100)
    dot = max(2 * 8 * 128 * 128 / H100.bfloat16_flops,
              (2 * TILE + 128 * 128 * 4) / H100.memory_bytes_per_second)  # fmt: skip
    assert gpu.cycles == 0
    assert gpu.places[next(p for p in gpu.places if p.operation == "dot_general")] == (
        pytest.approx(4 * dot)
    )


@pytest.mark.parametrize(
    ("root", "moved"),
    [
        ("f32[64,128] dynamic-update-slice(%a, %d, %i, %i)", 2 * TILE),  # in place
        ("f32[8,128] add(%d, %d)", 2 * TILE),
        ("f32[64,128] add(%a, %a)", 2 * GATHERED),
    ],
    ids=["an update of a slice", "a slice", "all of it"],
)
def test_of_an_array_that_is_only_sliced_the_slices_count(root, moved):
    """As where a scan keeps one layer's values in a stack of all: a GPU moves one layer's."""
    shape = root.partition(" ")[0]
    text = (
        f"%fused (a: f32[64,128], i: s32[]) -> {shape} {{\n"
        "  %a = f32[64,128] parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %d = f32[8,128] dynamic-slice(%a, %i, %i), dynamic_slice_sizes={8,128}\n"
        f"  ROOT %r = {root}\n}}\n\n"
        f"ENTRY %main (a: f32[64,128], i: s32[]) -> {shape} {{\n"
        "  %a = f32[64,128] parameter(0)\n  %i = s32[] parameter(1)\n"
        f"  ROOT %f = {shape} fusion(%a, %i), kind=kLoop, calls=%fused\n}}\n"
    )
    counted = cost(text, chip=H100).fusion_seconds * H100.memory_bytes_per_second
    assert counted == pytest.approx(moved, abs=8)  # and the number of the slice


def test_kernels_are_priced_apart_and_named_where_nobody_states_their_flops():
    call = 'custom-call(%x), custom_call_target="tpu_custom_call"'
    begin = LOOP.index("%fusion = ")
    text = LOOP.replace(
        LOOP[begin : LOOP.index("\n", begin)], f"%splash_fwd.3 = f32[8,128]{{1,0}} {call}"
    )
    unknown = cost(text)
    assert dict(unknown.kernels) == dict(unknown.unpriced) == {"Pallas splash_fwd": 1}
    assert unknown.kernel_seconds == pytest.approx(4 * 2 * TILE / 819e9)
    known = cost(text, kernel_flops={"splash_fwd": 197e9})
    assert known.kernel_seconds == pytest.approx(4e-3) and not known.unpriced


def test_of_a_conditional_the_longest_branch_counts():
    def branch(name, cycles):
        return (
            f"%{name} (q: f32[8,128]) -> f32[8,128] {{\n  %q = f32[8,128]{{1,0}} parameter(0)\n"
            "  ROOT %c = f32[8,128]{1,0} copy(%q), "
            f'backend_config={{"estimated_cycles":"{cycles}"}}\n'
            "}\n\n"
        )

    text = (
        branch("few", 10)
        + branch("many", 3000)
        + "ENTRY %main (a: f32[8,128], i: s32[]) -> f32[8,128] {\n"
        "  %a = f32[8,128]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %r = f32[8,128]{1,0} conditional(%i, %a, %a), "
        "branch_computations={%few, %many}\n}\n"
    )
    assert cost(text).cycles == 3000


def test_an_all_reduce_of_which_a_chip_keeps_its_part_is_a_reduce_scatter():
    text = (
        "%all-reduce-scatter (q: f32[8,128]) -> f32[4,128] {\n"
        "  %q = f32[8,128]{1,0} parameter(0)\n"
        "  %r = f32[8,128]{1,0} all-reduce(%q), replica_groups={{0,2},{1,3}}, to_apply=%sum\n"
        "  %i = u32[] partition-id()\n"
        "  ROOT %d = f32[4,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,128}\n}\n\n"
        "ENTRY %main (a: f32[8,128]) -> f32[4,128] {\n"
        "  %a = f32[8,128]{1,0} parameter(0)\n"
        "  ROOT %f = f32[4,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter\n}\n"
    )
    assert {key: sent.bytes for key, sent in cost(text).sent.items()} == {
        Key("reduce-scatter", ("y",)): TILE / 2
    }


GATHER = (
    "all-gather(%q), channel_id=7, replica_groups={{0,2},{1,3}}, dimensions={0}, "
    'frontend_attributes={chain_id="0"}'
)


def link_of_a_chain(name, root):
    """A fusion of a TPU's asynchronous gather; in each of them the gather stands."""
    return (
        f"%{name} (q: f32[64,128]) -> f32[128,128] {{\n"
        "  %q = f32[64,128]{1,0} parameter(0)\n"
        f"  %g = f32[128,128]{{1,0}} {GATHER}\n  {root}\n}}\n\n"
    )


END = "ROOT %r = f32[128,128]{1,0} custom-call(%g), custom_call_target="
CHAIN = (
    link_of_a_chain("begin_it", f'{END}"AsyncCollectiveStart"')
    + link_of_a_chain("work", "ROOT %r = f32[128,128]{1,0} add(%g, %g)")
    + link_of_a_chain("finish", f'{END}"AsyncCollectiveDone"')
)
DONE = "%d = f32[128,128]{1,0} fusion(%s), kind=kCustom, calls=%finish\n"


def test_a_chain_of_asynchronous_fusions_is_one_transfer():
    """As TPUs write it: a start, work that goes on meanwhile, and an end, each with the gather."""
    text = (
        CHAIN + "ENTRY %main (b: f32[64,128]) -> f32[128,128] {\n"
        "  %b = f32[64,128]{1,0} parameter(0)\n"
        "  %s = f32[128,128]{1,0} fusion(%b), kind=kCustom, calls=%begin_it\n"
        "  %w = f32[128,128]{1,0} fusion(%b), kind=kOutput, calls=%work, "
        'backend_config={"estimated_cycles":"CYCLES"}\n'
        f"  ROOT {DONE}}}\n"
    )
    hidden = cost(text.replace("CYCLES", "1500000")).sent[Key("all-gather", ("y",))]
    assert (hidden.count, hidden.bytes, hidden.waited_bytes) == (1, GATHERED, 0)
    waited = cost(text.replace("CYCLES", "0")).sent[Key("all-gather", ("y",))]
    assert (waited.count, waited.waited_bytes) == (1, GATHERED)


def test_a_chain_that_goes_on_in_a_loop_is_one_transfer_too():
    start = "  %s = f32[128,128]{1,0} fusion(%b), kind=kCustom, calls=%begin_it\n"
    text = LOOP.replace("%fused (p0", f"{CHAIN}%fused (p0")
    text = text.replace(
        "dimensions={0}, use_global_device_ids=true\n", f"dimensions={{0}}\n{start}"
    )
    text = text.replace("  ROOT %out", f"  {DONE}  ROOT %out")
    inside = "  %work_on = f32[128,128]{1,0} fusion(%x), kind=kOutput, calls=%work\n  %done ="
    text = text.replace("  %done =", inside)
    with_chain, alone = cost(text), cost()
    assert text.count("calls=%work") == text.count("calls=%begin_it") == 1
    gather, own = (c.sent[Key("all-gather", ("y",))] for c in (with_chain, alone))
    assert (gather.count, gather.bytes) == (own.count + 1, own.bytes + GATHERED)
    assert gather.waited_bytes == own.waited_bytes


def test_what_goes_on_in_the_sparse_cores_is_a_transfer_from_its_operand_on():
    """As a TPU writes it: a start that brings the program, an update with what to send, an end."""
    text = (
        "%gathers (q: f32[64,128]) -> f32[128,128] {\n  %q = f32[64,128]{1,0} parameter(0)\n"
        "  ROOT %g = f32[128,128]{1,0} all-gather(%q), replica_groups={{0,2},{1,3}}\n"
        '}, execution_thread="sparsecore"\n\n'
        "%calls_it (r: f32[64,128]) -> f32[128,128] {\n  %r = f32[64,128]{1,0} parameter(0)\n"
        '  ROOT %c = f32[128,128]{1,0} custom-call(%r), custom_call_target="TODO", '
        'called_computations={%gathers}\n}, execution_thread="sparsecore"\n\n'
        "ENTRY %main (b: f32[64,128]) -> f32[128,128] {\n"
        "  %b = f32[64,128]{1,0} parameter(0)\n"
        "  %s = ((), (), (s32[8]{0})) async-start(), calls=%calls_it\n"
        "  %before = f32[64,128]{1,0} copy(%b), "
        'backend_config={"estimated_cycles":"1500000"}\n'
        "  %u = ((f32[64,128]{1,0}), f32[128,128]{1,0}) async-update(%s, %before)\n"
        "  %while_it_goes_on = f32[64,128]{1,0} copy(%b), "
        'backend_config={"estimated_cycles":"CYCLES"}\n'
        "  %again = ((f32[64,128]{1,0}), f32[128,128]{1,0}) async-update(%u)\n"
        "  ROOT %d = f32[128,128]{1,0} async-done(%again)\n}\n"
    )
    hidden = cost(text.replace("CYCLES", "1500000")).sent[Key("all-gather", ("y",))]
    assert (hidden.count, hidden.bytes, hidden.waited_bytes) == (1, GATHERED, 0)
    waited = cost(text.replace("CYCLES", "0")).sent[Key("all-gather", ("y",))]
    assert (waited.count, waited.waited_bytes) == (1, GATHERED)
