"""The output of a run: a live line on a terminal, plain lines if output is piped."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

import jax
from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from training.config import TrainingConfig
from wsekern.error_line import printable, without_controls
from wsekern.progress import show_progress

_COMPILED = "/jax/core/compile/backend_compile_duration"
_WIDE = 110  # columns; a narrower terminal gets no bar
_BAR = 16  # columns of the bar
_BETWEEN = "  "


class Console:
    """Reports a run on standard output; enter it for the time of the run."""

    def __init__(self, config: TrainingConfig, terminal: Terminal | None = None) -> None:
        """Shows nothing yet.

        Args:
          config: every choice of the run.
          terminal: where to write; None: standard output.
        """
        self._config = config
        self._terminal = terminal or Terminal(highlight=False, markup=False)
        self._compiled = 0
        self._lost = False  # output is closed: write nothing more
        self._expected: int | None = None  # programs compiled up to the first step
        bar = [BarColumn(bar_width=_BAR)] if self._terminal.width >= _WIDE else []
        self._live = Progress(
            *bar, TextColumn("{task.description}", markup=False), console=self._terminal
        )
        self._task = self._live.add_task("", total=config.steps)

    def __enter__(self) -> "Console":
        jax.monitoring.register_event_duration_secs_listener(self._count)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        jax.monitoring.unregister_event_duration_listener(self._count)

    def show(self, content: RenderableType, *, wrap: bool = True) -> None:
        """Prints `content` above the progress."""
        self._try(lambda: self._terminal.print(content, soft_wrap=not wrap))

    def note(self, line: str) -> None:
        """Prints a line above the progress."""
        self.show(Text(printable(line)), wrap=False)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Says that programs are being compiled, and after the `with` block how long it took."""
        start = time.monotonic()
        with self.busy("compiling the step and the evaluation"):
            yield
        self.note(f"compiled in {time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Prints what the `with` block does, and from the third second on how long it has."""
        self.note(doing)
        with self.waiting(doing):
            yield

    @contextlib.contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Prints what the `with` block does and for how long, from the third second on."""
        with show_progress(doing, cast(TextIO, self._terminal.file)):
            yield

    def progress(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        tokens_per_s: float,
        share_of_peak: float,
        seconds_left: float,
    ) -> None:
        """Shows the progress: live on a terminal, else a line every `log_every` steps.

        Args:
          step: steps taken so far.
          loss: of the last step, nats a token.
          learning_rate: of the last step.
          tokens_per_s: over all devices, in the last steps.
          share_of_peak: FLOP/s over the peak of the devices.
          seconds_left: the time to the last step at this speed.
        """
        steps, compiled = self._config.steps, self._compiled
        # By the first step every program has been compiled. Any later one is a recompilation: a
        # shape or a layout has changed.
        self._expected = compiled if self._expected is None else self._expected
        facts = [
            f"{step}/{steps}",
            f"loss {loss:.4f}",
            f"ETA {_clock(seconds_left)}",
            f"{tokens_per_s:,.0f} tok/s",
            f"lr {learning_rate:.1e}",
            f"{share_of_peak:.1%} peak",
        ]
        recompiled = compiled - self._expected
        # Recompilations come early in the line, so that the narrowest terminal shows them too.
        facts.insert(2 if recompiled else len(facts), f"{recompiled} recompiles")
        if self._terminal.is_terminal:
            line = _join_what_fits(facts, self._terminal.width)
            self._try(self._live.start)
            self._try(lambda: self._live.update(self._task, description=line, completed=step))
        elif step == 1 or step == steps or step % self._config.log_every == 0:
            self.note(_BETWEEN.join(facts))

    def evaluation(self, step: int, val_loss: float) -> None:
        """Prints the loss on the validation data, nats a token."""
        self.note(f"step {step}: validation loss {val_loss:.4f}")

    def end(self) -> None:
        """Ends the live line; later output stands below it."""
        if self._live.live.is_started:
            self._try(self._live.stop)

    def sample(self, text: str) -> None:
        """Prints text that the model has written."""
        self.show(Panel(Text(without_controls(text)), title="sample", title_align="left"))

    def _try(self, say: Callable[[], None]) -> None:
        """Runs `say`; if output is closed or its disk is full, the run goes on in silence."""
        try:
            if not self._lost:
                say()
        except (OSError, SystemExit):  # rich raises SystemExit if the pipe is closed
            self._lost = True

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compiled += event == _COMPILED


def _join_what_fits(facts: list[str], width: int) -> str:
    """As many of the first `facts` as fit beside the bar."""
    room = width - 1 - (_BAR + 1 if width >= _WIDE else 0)
    while len(_BETWEEN.join(facts)) > room and len(facts) > 1:
        facts = facts[:-1]
    return _BETWEEN.join(facts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(min(seconds, 360_000)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
