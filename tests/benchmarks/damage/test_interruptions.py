"""Damage to what a run has saved is noticed, or changes nothing; each kind of moment is tried."""

import collections

from benchmarks.damage import interruptions
from benchmarks.reliability import failure


def test_every_damage_ends_right():
    cases = [case for case in interruptions.cases(1) if case.kind == "damaged runs"]
    assert len(cases) >= 60
    assert not {case.name: problem for case in cases if (problem := failure(case))}


def test_there_are_enough_kills_and_signals():
    cases = interruptions.cases(0)
    tried = collections.Counter(case.kind for case in cases)
    assert tried["kills"] >= 10 and tried["signals"] >= 10
    assert len({case.name for case in cases}) == len(cases)
    assert [case.name for case in interruptions.cases(0)] == [case.name for case in cases]
