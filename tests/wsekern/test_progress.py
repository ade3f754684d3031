"""Long work says what it is; short work is silent."""

import io
import time

import pytest

from wsekern import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.02)


def wait_for(stream, count):
    for _ in range(500):
        if stream.getvalue().count("so far") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(stream.getvalue())


def test_a_log_gets_a_line_now_and_then():
    stream = io.StringIO()
    with progress.show_progress("compiling the step", stream):
        wait_for(stream, 2)
    assert set(stream.getvalue().splitlines()) == {"compiling the step: 0 s so far"}


def test_a_terminal_gets_one_line_which_is_wiped():
    stream = Terminal()
    with progress.show_progress("compiling", stream):
        wait_for(stream, 1)
    said = "compiling: 0 s so far"
    assert stream.getvalue() == f"\r{said}\r{' ' * len(said)}\r"


def test_what_is_over_at_once_says_nothing(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 60.0)
    stream = io.StringIO()
    with progress.show_progress("compiling", stream):
        pass
    assert not stream.getvalue()


def test_an_error_goes_through_and_a_closed_stream_is_no_error():
    stream = io.StringIO()
    with pytest.raises(KeyError), progress.show_progress("compiling", stream):
        wait_for(stream, 1)
        stream.close()
        time.sleep(0.1)
        raise KeyError("x")
