"""Predicted cycles of collectives against the published formulas.

Luczynski et al., HPDC 2024; He et al., OSDI 2025; T_R = 2.
"""

import dataclasses
import functools
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.fabric.flood import cost as flood_cost
from wsekern.fabric.reductions import choice, optimal
from wsekern.fabric.reductions.choice import LINES, cheapest, predicted_cycles

BOTH = [(64, 1), (16, 256), (256, 16), (512, 4096)]  # PEs, words


def cycles(algorithm, P, B, root=0):
    return predicted_cycles(algorithm, [P], B, wk.WSE2, root)


@pytest.mark.parametrize(("P", "B"), BOTH)
def test_reductions_to_the_end_of_a_line_cost_what_is_published(P, B):
    lg, side = math.log2(P), math.isqrt(P)
    assert cycles("star", P, B) == B * (P - 1) + 5
    assert cycles("chain", P, B) == B + 6 * (P - 1)
    assert cycles("tree", P, B) == max(B * lg, B * P * lg / (2 * (P - 1))) + P - 1 + 5 * lg
    if side**2 == P:
        hops = (P - side) + side * (side - 1)
        expected = max(2 * B, B * hops / (P - 1)) + P - 1 + 5 * (2 * side - 2)
        assert cycles("two_phase", P, B) == expected


@pytest.mark.parametrize(("P", "B"), BOTH)
def test_a_ring_and_a_flood_cost_what_is_published(P, B):
    ring = predicted_cycles("ring", [P], B, wk.WSE2)
    assert ring == pytest.approx(2 * (P - 1) * B / P + 4 * P - 6 + 10 * (P - 1))
    assert flood_cost(1, P, B).cycles(wk.WSE2) == B + P + 4
    assert flood_cost(P, P, B).cycles(wk.WSE2) == B + 2 * P + 3


@pytest.mark.parametrize(("P", "groups"), [(240, 15), (256, 16), (720, 24), (600, 24), (512, 32)])
def test_a_k_tree_halves_hops_and_steps(P, groups):
    """With the groups of the published decode programs."""
    cost = LINES["k_tree"].cost(P, 64, choice.k_tree.middle(P))
    size = choice.k_tree.group(P)
    assert groups in (size, P // size)
    assert cost.contention == 4 * 64
    assert cost.distance == pytest.approx(P / 2, abs=size)
    assert cost.depth == pytest.approx((size + P / size) / 2, abs=1)


@functools.cache
def fewest_hops(n, depth):
    """By trying every tree whose farthest child has `s` PEs below it."""
    if n == 1:
        return 0
    if depth == 0:
        return math.inf
    return min(fewest_hops(s, depth - 1) + fewest_hops(n - s, depth) + n - s for s in range(1, n))


@pytest.mark.parametrize("P", [2, 3, 7, 12])
@pytest.mark.parametrize("B", [1, 8, 512])
def test_the_optimal_tree_is_the_best_of_all(P, B):
    deepest = min(P - 1, math.ceil(4 * math.sqrt(P)))
    best = min(B * fewest_hops(P, d) / (P - 1) + P - 1 + 5 * d for d in range(1, deepest + 1))
    cost = LINES["optimal"].cost(P, B, 0)
    published = dataclasses.replace(cost, contention=0)
    assert published.cycles(wk.WSE2) == pytest.approx(best)
    assert published.cycles(wk.WSE2) <= cost.cycles(wk.WSE2)
    edges = optimal.tree(P, B)
    assert sorted(child for child, _ in edges) == list(range(1, P))
    assert sum(child - parent for child, parent in edges) <= fewest_hops(P, 1)


@pytest.mark.parametrize(("P", "B", "root"), [(9, 4, 0), (16, 64, 7), (30, 1, 29)])
def test_a_round_sends_each_tile_once_and_in_order(P, B, root):
    heard: set[int] = set()
    parents: dict[int, int] = {}
    for pairs in optimal.rounds(P, B, root):
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        assert not {b for _, b in pairs} & heard, "one that has been heard is spoken to"
        heard |= {a for a, _ in pairs}
        parents |= dict(pairs)
    assert heard == set(range(P)) - {root} == set(parents)


def test_the_best_algorithm_depends_on_the_words():
    """As published: a star for a word, two phases for about as many words as PEs, then a chain."""
    lines = ("star", "chain", "tree", "two_phase")

    def best(P, B):
        return min(lines, key=lambda name: cycles(name, P, B))

    assert best(8, 1) == "star"
    assert best(256, 256) == "two_phase"
    assert best(64, 100_000) == "chain"


def test_a_ring_pays_for_very_many_words_alone():
    assert cheapest([16], 64, wk.WSE2)[0] != "ring"
    assert cheapest([16], 1_000_000, wk.WSE2)[0] == "ring"


def test_auto_is_the_cheapest_of_all():
    for sizes, root in (([64], 0), ([8, 16], 5), ([32, 32], None)):
        name, least = cheapest(sizes, 100, wk.WSE2, root)
        others = [a for a in LINES if (len(sizes) == 2 or a != "snake")]
        assert least == predicted_cycles(name, sizes, 100, wk.WSE2, root)
        assert all(least <= predicted_cycles(a, sizes, 100, wk.WSE2, root) for a in others)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 7), (1, 16), (4, 5)])
@pytest.mark.parametrize("algorithm", [*LINES, "ring", "snake"])
def test_a_program_receives_what_its_algorithm_says(algorithm, sizes):
    """Read off the trace, for a word and for many, to one PE and to all."""
    wafer = wk.Wafer.abstract(wk.WSE2, *sizes)
    along = ("y", "x")
    for words, root in ((1, None), (30, None), (30, sizes[0] * sizes[1] - 2)):
        if root is not None and algorithm == "ring":
            continue

        def kernel(u, root=root):
            if root is None:
                return fabric.all_reduce(u, along, algorithm=algorithm)
            return fabric.reduce(u, along, root, algorithm=algorithm)

        run = wafer.map(kernel, in_specs=P(along), out_specs=P(along))
        u = jax.ShapeDtypeStruct((words * wafer.size,), "float32")
        read = wk.traffic(run, u, wafer=wafer)
        assert (read.words, read.steps) == fabric.received(algorithm, sizes, words, root)
