"""What goes wrong on purpose: the cases of `python -m benchmarks reliability` that are quick."""

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("tokenizers")

from benchmarks import reliability  # noqa: E402
from benchmarks.damage import templates, tokenizers  # noqa: E402
from benchmarks.damage.case import Case  # noqa: E402

# Bombs that end when their two seconds of processor time are over, not before.
LONG = {
    *("a power", "powers of powers", "nested loops", "nested silent loops", "join", "indent"),
    *("slice", "wordwrap", "tojson", "tojson of a deep list", "squaring a number", "lipsum"),
    *("a macro that calls itself twice", "sorting", "a product of sums", "groupby", "unique"),
    *("a cycler", "a long expression"),
}
QUICK = [
    case
    for case in templates.cases(0)
    if case.name not in LONG and not case.name.startswith("grown")
]
QUICK += [c for c in tokenizers.cases(0) if c.kind == "tokenizer bombs"]
QUICK += [c for c in tokenizers.cases(0) if c.kind == "damaged tokenizers"][::4]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.kind}: {case.name}")
def test_case_ends_as_it_should(case):
    assert reliability.failure(case) is None


def test_there_are_enough_templates():
    kinds = [case.kind for case in templates.cases(7)]
    assert kinds.count("template bombs") >= 32 and kinds.count("template escapes") >= 24
    assert len(kinds) >= 60


def test_a_case_that_ends_wrongly_is_named(monkeypatch, capsys):
    def wrong(folder):
        raise AssertionError(f"{len(list(folder.iterdir()))} files")

    made = [Case("kind", "right", lambda folder: None), Case("kind", "wrong", wrong)]
    monkeypatch.setattr(reliability, "collect", lambda seed: made)
    with pytest.raises(SystemExit) as ended:
        reliability.main([])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "kind: wrong: AssertionError: 0 files" in printed
    reliability.main(["--names", "right"])
