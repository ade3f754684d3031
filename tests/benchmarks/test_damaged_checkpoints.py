"""Hostile and damaged model folders: a sample of what `python -m benchmarks reliability` tries."""

import collections

import pytest

from benchmarks import reliability
from benchmarks.damage import checkpoint_files

CASES = checkpoint_files.cases(1)


@pytest.mark.parametrize("case", CASES[::11], ids=lambda case: f"{case.kind}: {case.name}")
def test_case_ends_as_it_should(case):
    assert reliability.failure(case) is None


def test_there_are_enough_cases():
    kinds = collections.Counter(case.kind for case in checkpoint_files.cases(5))
    assert kinds["hostile config.json"] >= 120 and kinds["hostile safetensors"] >= 80
    assert kinds["bit flips"] + kinds["truncations"] >= 100
