"""What a run prints, on a terminal and into a pipe."""

import io
import re

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console as Terminal

from training.config import TrainingConfig
from training.console import Console

CONFIG = TrainingConfig(steps=40, log_every=10)
MEASURED = {
    "loss": 2.34567,
    "learning_rate": 1e-3,
    "tokens_per_s": 12_345.0,
    "share_of_peak": 0.123,
    "seconds_left": 3_723.0,
}


def file_terminal():
    return Terminal(file=io.StringIO(), width=80, markup=False, highlight=False)


def lines_of(terminal):
    """The lines written so far."""
    return terminal.file.getvalue().splitlines()


def test_a_pipe_gets_a_line_every_log_every_steps_and_at_both_ends():
    terminal = file_terminal()
    with Console(CONFIG, terminal) as console:
        for step in range(1, 41):
            console.progress(step=step, **MEASURED)
    steps = [line.partition("/")[0] for line in lines_of(terminal)]
    assert steps == ["1", "10", "20", "30", "40"]
    assert lines_of(terminal)[0] == (
        "1/40  loss 2.3457  ETA 1:02:03  12,345 tok/s  lr 1.0e-03  12.3% peak  0 recompiles"
    )


def test_a_terminal_gets_a_live_line():
    output = io.StringIO()
    terminal = Terminal(file=output, width=120, force_terminal=True, markup=False)
    with Console(CONFIG, terminal) as console:
        console.progress(step=3, **MEASURED)
        console.evaluation(3, 2.5)
        console.end()
    assert "3/40  loss 2.3457" in output.getvalue() and "━" in output.getvalue()
    assert "step 3: validation loss 2.5000" in output.getvalue()


def test_a_narrow_terminal_shows_the_first_facts_uncut():
    output = io.StringIO()
    terminal = Terminal(file=output, width=40, force_terminal=True, markup=False)
    with Console(CONFIG, terminal) as console:
        console.progress(step=3, **MEASURED)
        console.end()
    assert "3/40  loss 2.3457  ETA 1:02:03" in output.getvalue()
    assert "tok/s" not in output.getvalue() and "…" not in output.getvalue()


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_a_run_goes_on_when_nobody_can_read_it(trouble):
    class Gone(io.StringIO):
        def write(self, text):
            raise trouble

    with Console(CONFIG, Terminal(file=Gone(), width=80)) as console:
        console.note("lost")
        console.progress(step=1, **MEASURED)
        console.sample("lost too")


def test_what_is_compiled_after_the_first_step_is_counted():
    terminal = file_terminal()
    with Console(CONFIG, terminal) as console:
        console.progress(step=1, **MEASURED)
        jax.jit(lambda x: x * 3 + 17)(jnp.arange(5))
        console.progress(step=10, **MEASURED)
    assert "0 recompiles" in lines_of(terminal)[0]
    assert re.search(r"loss 2.3457  [1-9]\d* recompiles  ETA", lines_of(terminal)[1])


def test_nothing_is_counted_once_the_run_is_over():
    with Console(CONFIG, file_terminal()) as console:
        pass
    compiled = console._compiled
    jax.jit(lambda x: x * 5 + 19)(jnp.arange(7))
    assert console._compiled == compiled


def test_compiling_is_announced_before_it_is_done():
    terminal = file_terminal()
    with Console(CONFIG, terminal) as console, console.compiling():
        assert lines_of(terminal) == ["compiling the step and the evaluation"]
    assert lines_of(terminal)[1].startswith("compiled in ")


@pytest.mark.parametrize("text", ["[red]not markup[/red]", "a line\n\nand another"])
def test_a_sample_is_shown_as_it_is(text):
    terminal = file_terminal()
    with Console(CONFIG, terminal) as console:
        console.sample(text)
    for line in text.splitlines():
        assert line in terminal.file.getvalue()


def test_nothing_that_a_terminal_would_obey_is_shown():
    terminal = file_terminal()
    with Console(CONFIG, terminal) as console:
        console.note("removed \x1b[2J\nx.partial")
        console.sample("a\x1b[31m\nb")
    output = terminal.file.getvalue()
    assert "\x1b" not in output
    assert r"removed \x1b[2J\nx.partial" in output and r"a\x1b[31m" in output
