"""Each GGUF file that goes wrong on purpose is refused by name, or read as it is meant."""

import collections

import pytest

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from benchmarks.damage import gguf_files  # noqa: E402
from benchmarks.damage.gguf_writer import small_llama  # noqa: E402
from benchmarks.reliability import failure  # noqa: E402


def test_every_case_ends_right():
    cases = gguf_files.cases(0)
    problems = {case.name: problem for case in cases if (problem := failure(case))}
    assert not problems
    tried = collections.Counter(case.kind for case in cases)
    assert tried["hostile GGUF files"] >= 300 and tried["GGUF bit flips"] >= 100


def test_the_file_that_is_damaged_is_a_right_one(tmp_path):
    file = small_llama().write(tmp_path / "a.gguf")
    gguf_files._read(file)
    assert gguf_files.load_tokenizer(file).encode("ab<think>") == [257, 256, 259]
