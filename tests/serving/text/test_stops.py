"""Stop strings, in any pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text.stops import StopStrings, held_length

SHORT = st.text("abc", max_size=12)


def written(stops, pieces):
    found = StopStrings(stops)
    return "".join(map(found.feed, pieces)) + found.finish(), found.matched


def test_the_text_ends_before_a_stop_string_that_spans_pieces():
    assert written(["END"], ["the wafer E", "N", "D and more"]) == ("the wafer ", "END")
    assert written(["END"], ["the wafer E", "N"]) == ("the wafer EN", None)
    assert written([], ["any", "thing"]) == ("anything", None)


def test_only_what_may_begin_a_stop_string_is_held_back():
    stops = StopStrings(["\n\n", "User:"])
    assert stops.feed("one\n") == "one" and stops.feed("Us") == "\n" and stops.feed("e") == ""
    assert stops.feed(" two") == "Use two" and stops.finish() == "" and stops.matched is None


@settings(max_examples=300, deadline=None)
@given(SHORT, st.lists(SHORT.filter(bool), max_size=4), st.lists(st.integers(1, 4)))
def test_any_pieces_give_the_text_before_the_first_stop_to_be_complete(text, stops, sizes):
    pieces, rest = list[str](), text
    for size in sizes:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    ends = [
        (end, -len(stop), stop)
        for stop in stops
        for end in range(len(text) + 1)
        if text[:end].endswith(stop)
    ]
    end, negative, matched = min(ends) if ends else (len(text), 0, None)
    assert written(stops, [*pieces, rest]) == (text[: end + negative], matched)


def test_held_length_is_that_of_a_beginning():
    assert held_length("abc", ["cd", "bcde"]) == 2 and held_length("abc", ["abc"]) == 0


def test_refuses_an_empty_stop_string():
    with pytest.raises(ValueError, match="stop has an empty text"):
        StopStrings(["a", ""])
