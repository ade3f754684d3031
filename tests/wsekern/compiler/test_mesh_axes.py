import pytest

from wsekern.compiler import hlo
from wsekern.compiler.mesh_axes import MeshAxes, groups_of, pairs_of

MESH = MeshAxes(("y", "x"), (2, 4), (False, True))


def instruction(attributes):
    line = f"  ROOT %c = f32[1]{{0}} all-reduce(%a), {attributes}\n"
    return hlo.parse(f"ENTRY %m (a: f32[1]) -> f32[1] {{\n{line}}}\n").main.root


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}",
         ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("channel_id=1", ()),
    ],
)  # fmt: skip
def test_groups_are_read_in_every_form_that_xla_writes(attributes, groups):
    assert groups_of(instruction(attributes)) == groups


def test_axes_are_those_along_which_a_group_differs():
    assert MESH.of_group((0, 4)) == ("y",)
    assert MESH.of_group((0, 1, 2, 3)) == ("x",)
    assert MESH.of_group((0, 5)) == ("y", "x")
    assert MESH.of_group((3,)) == ()


def test_a_permutation_has_a_direction_and_no_moves_to_itself():
    one = instruction("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,4}}")
    assert pairs_of(one) == ((0, 1), (1, 2), (2, 3), (3, 0))
    assert MESH.direction(pairs_of(one)) == 1
    assert MESH.direction([(b, a) for a, b in pairs_of(one)]) == -1
    assert MESH.direction([]) == 0


def test_axes_close_to_a_ring_together_only_if_each_does():
    assert MESH.is_ring(("x",)) and not MESH.is_ring(("y", "x")) and not MESH.is_ring(())
