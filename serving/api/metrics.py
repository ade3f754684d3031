"""Count what the server does, in the text format of Prometheus."""

import bisect
import threading
from collections.abc import Iterable, Sequence

_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A number for each combination of labels."""

    def __init__(self, name: str, meaning: str, labels: Sequence[str] = ()) -> None:
        self.name, self.meaning, self.labels = name, meaning, tuple(labels)
        self._values: dict[tuple[str, ...], float] = {}
        self._lock = threading.Lock()

    def add(self, amount: float, *labels: str) -> None:
        """Adds to the number of these labels."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + amount

    def lines(self) -> Iterable[str]:
        """The lines of the text format."""
        yield from _head(self.name, self.meaning, "counter")
        with self._lock:
            values = dict(self._values)
        for labels, value in values.items():
            yield f"{self.name}{_labels(self.labels, labels)} {_number(value)}"


class Histogram:
    """How many values fell below each of some bounds."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        self.name, self.meaning, self.bounds = name, meaning, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value, or the same value several times."""
        with self._lock:
            self._counts[bisect.bisect_left(self.bounds, value)] += times
            self._sum += value * times

    def lines(self) -> Iterable[str]:
        """The lines of the text format."""
        yield from _head(self.name, self.meaning, "histogram")
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {_number(total)}"
        yield f"{self.name}_count {below}"


class Metrics:
    """All that is counted; the engines' own figures are added when they are read."""

    def __init__(self) -> None:
        self.requests = Counter(
            "wsekern_requests_total", "Requests answered.", ("route", "method", "status")
        )
        self.prompt_tokens = Counter("wsekern_prompt_tokens_total", "Tokens of prompts.", ["model"])
        self.cached_tokens = Counter(
            "wsekern_cached_prompt_tokens_total", "Tokens of prompts found in the cache.", ["model"]
        )
        self.completion_tokens = Counter(
            "wsekern_completion_tokens_total", "Tokens made.", ["model"]
        )
        self.finishes = Counter(
            "wsekern_finishes_total", "Texts by why they ended.", ("model", "reason")
        )
        self.first_token = Histogram(
            "wsekern_time_to_first_token_seconds",
            "From a request's submission to its first token.",
            _LATENCIES,
        )
        self.token_time = Histogram(
            "wsekern_time_per_token_seconds",
            "Between one token and the next, averaged over a text.",
            _TOKEN_TIMES,
        )
        self.queue_time = Histogram(
            "wsekern_queue_time_seconds", "From a request's submission to its start.", _LATENCIES
        )

    def text(self, gauges: Iterable[tuple[str, str, str, dict[str, float]]]) -> str:
        """The text that Prometheus reads.

        Args:
          gauges: name, meaning, "gauge" or "counter", and the value of each model.
        """
        lines: list[str] = []
        for metric in vars(self).values():
            lines += metric.lines()
        for name, meaning, kind, values in gauges:
            lines += _head(name, meaning, kind)
            lines += [f"{name}{_labels(('model',), (m,))} {_number(v)}" for m, v in values.items()]
        return "\n".join(lines) + "\n"


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    escaped = (
        value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values
    )
    return "{" + ",".join(f'{n}="{v}"' for n, v in zip(names, escaped, strict=True)) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
