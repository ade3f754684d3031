"""This file is which algorithm serves a matrix product, what each would cost, and why.

Words are 32-bit and steps are moves that wait for one another, per PE and for the product alone;
held bytes are what a PE keeps of others' tiles at a time. Cycles are predicted for wafers only, by
the model of P. Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024: the longer of words
through a PE and arithmetic, then hops, and 2 ramps + 1 for every dependent step.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from wsekern.kernels.matmul import cannon
from wsekern.kernels.matmul.tile import Form
from wsekern.wafer.limits import gather_limit
from wsekern.wafer.wafer import Wafer

NAMES = ("allgather", "summa", "cannon", "mesh", "collective", "stationary", "2.5d")
_WORD = 4  # bytes
_ROUND = 512  # rows: of fewer a product runs at a worse rate on a CPU
_GATHERED_BYTES = 4 * 2**20  # on an emulated device (benchmarks/RESULTS.md)
_FEW_WORDS = 4  # a stationary factor pays where it moves this many times less
_LITTLE = 2**18  # bytes whose gathering costs no more than the call itself


class Plan(NamedTuple):
    """An algorithm and its options, as the kernels take them."""

    algorithm: str
    options: tuple[tuple[str, Any], ...] = ()
    unit: int = 1  # the meeting dimension is padded to a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The triple S = X @ Y of a product (see tile_product) on a wafer, whichever is asked for.

    Sizes are whole; bytes are those of an element.
    """

    form: Form = "nn"
    rows: int
    meeting: int
    columns: int
    x_bytes: int
    y_bytes: int
    s_bytes: int
    x_copies: int = 1  # leading dimensions on one wafer
    y_copies: int = 1
    batched: bool = False
    wafer: Wafer

    @property
    def x(self) -> int:
        """Bytes of a PE's tile of X."""
        return self.x_copies * self._tile(self.rows, self.meeting) * self.x_bytes

    @property
    def y(self) -> int:
        """Bytes of a PE's tile of Y."""
        return self.y_copies * self._tile(self.meeting, self.columns) * self.y_bytes

    @property
    def s(self) -> int:
        """Bytes of a PE's tile of S."""
        return self.x_copies * self._tile(self.rows, self.columns) * self.s_bytes

    @property
    def gathered(self) -> int:
        """Bytes of a row of X's tiles and a column of Y's."""
        return self.wafer.width * self.x + self.wafer.height * self.y

    @property
    def products(self) -> int:
        """Multiply-adds of one PE."""
        return self.x_copies * self._tile(self.rows, self.columns) * self.meeting

    def _tile(self, rows: int, columns: int) -> int:
        return -(-rows // self.wafer.height) * -(-columns // self.wafer.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one algorithm would cost, or why it cannot serve."""

    plan: Plan
    words: float = 0
    steps: int = 0
    hops: int = 0
    held_bytes: float = 0
    cycles: float | None = None  # on a wafer
    rounds: int = 1  # one after another, each of a share of the rows
    refused: str = ""
    note: str = ""


def candidates(problem: Problem) -> dict[str, Candidate]:
    """Every algorithm by name, with its cost on the problem's wafer."""
    made = (_allgather, _summa, _cannon, _mesh, _collective, _stationary, _over_wafers)
    return {name: _timed(make(problem), problem) for name, make in zip(NAMES, made, strict=True)}


def chosen(problem: Problem) -> tuple[Candidate, str]:
    """What `auto` takes, and why."""
    costs = candidates(problem)
    return (_on_devices if problem.wafer.machine is None else _on_a_wafer)(problem, costs)


def serving(wafer: Wafer) -> tuple[str, ...]:
    """The algorithms that serve the grid of `wafer`."""
    square = Problem(rows=1, meeting=1, columns=1, x_bytes=4, y_bytes=4, s_bytes=4, wafer=wafer)
    return tuple(name for name, c in candidates(square).items() if not c.refused)


def plan(problem: Problem, algorithm: str) -> Plan:
    """How `algorithm` runs on the problem's wafer.

    Raises:
      ValueError: it cannot serve there.
    """
    if algorithm == "auto":
        return chosen(problem)[0].plan
    candidate = candidates(problem)[algorithm]
    if candidate.refused:
        raise ValueError(
            f"matmul: algorithm={algorithm!r} {candidate.refused}; use one of "
            f"{serving(problem.wafer)}"
        )
    return candidate.plan


def _on_devices(problem, costs):
    gather, stationary = costs["allgather"], costs["stationary"]
    if problem.gathered > _LITTLE and _FEW_WORDS * stationary.words <= gather.words:
        return stationary, "few rows: the large factor stays, and far fewer words move"
    if problem.gathered <= _gathered_bytes(problem.wafer):
        return gather, "what it gathers is little"
    if stationary.rounds > 1:
        return stationary, "a gather would be large; in rounds only a share of the rows is held"
    return costs["summa"], "a gather would be large, and the rows do not divide into rounds"


def _on_a_wafer(problem, costs):
    room = gather_limit(problem.wafer)
    usable = {name: c for name, c in costs.items() if not c.refused}
    fitting = [c for c in usable.values() if c.held_bytes <= room]
    if not fitting:
        least = min(usable.values(), key=lambda c: c.held_bytes)
        return least, f"none holds at most {room} bytes; it holds the least"
    best = min(fitting, key=lambda c: c.cycles)
    return best, f"the fewest predicted cycles of those that hold at most {room} bytes"


def _timed(c: Candidate, problem: Problem) -> Candidate:
    machine = problem.wafer.machine
    if machine is None:
        return c
    arithmetic = problem.products / machine.fmacs_per_cycle(_dtype(problem))
    if c.plan.algorithm == "2.5d":
        arithmetic /= problem.wafer.wafers
    words = c.words * _WORD / machine.link_bytes_per_cycle
    busy = max(arithmetic, words)
    if c.plan.algorithm in ("allgather", "stationary"):
        busy = arithmetic + words  # nothing is multiplied before all is there
    latency = c.hops * machine.hop_cycles + c.steps * (2 * machine.ramp_cycles + 1)
    return dataclasses.replace(c, cycles=busy + latency)


def _dtype(problem: Problem) -> str:
    return "float16" if min(problem.x_bytes, problem.s_bytes) == 2 else "float32"


def _gathered_bytes(wafer: Wafer) -> int:
    allowed = gather_limit(wafer)
    return min(allowed, _GATHERED_BYTES) if wafer.platform == "cpu" else allowed


def _rounds(problem: Problem) -> int:
    """Into how many shares the rows of a tile are best cut; 1 where none near it divides them."""
    wafer = problem.wafer
    if problem.form == "tn" or wafer.machine is not None:
        return 1
    if problem.gathered <= _gathered_bytes(wafer):
        return 1
    tall = -(-problem.rows // wafer.height)
    wanted = problem.x_copies * tall * wafer.height // _ROUND
    near = range(wanted, wanted // 2, -1)
    return next((rounds for rounds in near if rounds and tall % rounds == 0), 1)


def _allgather(p: Problem) -> Candidate:
    h, w = p.wafer.height, p.wafer.width
    return Candidate(
        plan=Plan("allgather"),
        words=((w - 1) * p.x + (h - 1) * p.y) / _WORD,
        steps=2,
        hops=h + w,
        held_bytes=p.gathered,
    )


def _summa(p: Problem) -> Candidate:
    h, w = p.wafer.height, p.wafer.width
    steps = max(h, w)
    of_x, of_y = p.x * w / steps, p.y * h / steps
    # A panel is flooded, or summed where it is one of the result.
    summed_x = 2 * (w - 1) / w if p.form == "nt" else 1
    summed_y = 2 * (h - 1) / h if p.form == "tn" else 1
    return Candidate(
        plan=Plan("summa"),
        words=steps * (summed_x * of_x + summed_y * of_y) / _WORD,
        steps=2 * steps,
        hops=steps * (h + w),
        held_bytes=of_x + of_y,
    )


def _cannon(p: Problem) -> Candidate:
    return _ring_of_tiles(p, "cannon", max(p.wafer.height, p.wafer.width) - 1)


def _mesh(p: Problem) -> Candidate:
    return _ring_of_tiles(p, "mesh", 2)


def _ring_of_tiles(p: Problem, name: str, hops: int) -> Candidate:
    h, w = p.wafer.height, p.wafer.width
    blocks = math.lcm(h, w)
    made = Plan(name, (("ring", "folded" if name == "mesh" else "plain"),), blocks)
    if not cannon.serves(h, w):
        return Candidate(
            plan=made,
            refused=f"needs a grid that is square or whose sides' least common multiple is at most "
            f"twice the longer, it is {h}x{w}",
        )
    (tiles_x, steps_x), (tiles_y, steps_y) = (_skew(blocks // side, blocks) for side in (w, h))
    if name == "mesh" and h != w:  # each is laid out in the order of its ring, in one move
        tiles_x, steps_x, tiles_y, steps_y = tiles_x + 1, steps_x + 1, tiles_y + 1, steps_y + 1
    turns = (blocks - 1) * (p.x * w + p.y * h) / blocks
    return Candidate(
        plan=made,
        words=(turns + tiles_x * p.x + tiles_y * p.y) / _WORD,
        steps=2 * (blocks - 1) + steps_x + steps_y,
        hops=(blocks - 1) * hops + (steps_x + steps_y) * max(h, w),
        held_bytes=2 * (p.x + p.y),
    )


def _skew(slots: int, blocks: int) -> tuple[float, int]:
    """Tiles and steps of a skew: one move, or by binary digits where a PE holds several blocks."""
    if slots == 1:
        return 1, 1
    turns = [divmod(2**bit, slots) for bit in range((blocks - 1).bit_length())]
    tiles = sum((slots if near else inside) / slots for near, inside in turns)
    return tiles, sum(bool(near) + bool(inside) for near, inside in turns)


def _collective(p: Problem) -> Candidate:
    h, w = p.wafer.height, p.wafer.width
    along = "x" if h * p.y <= w * p.x else "y"
    order = "plain" if p.wafer.machine is None else "folded"
    ring, moving, held = (w, p.x, h * p.y) if along == "x" else (h, p.y, w * p.x)
    return Candidate(
        plan=Plan("collective", (("along", along), ("ring", order))),
        words=((w - 1) * p.x + (h - 1) * p.y) / _WORD,
        steps=2 * ring - 1,
        hops=h + w + 2 * ring,
        held_bytes=held + 2 * moving,
        note=f"round along {along}",
    )


def _stationary(p: Problem) -> Candidate:
    h, w = p.wafer.height, p.wafer.width
    tall = -(-p.rows // h) * h
    few = 2 * p.rows <= tall  # padding is most of what a gather would move

    wide_x, wide_s = -(-p.meeting // w), -(-p.columns // w)

    def gathered(width, size):
        whole = p.x_copies * p.rows * width * size
        return whole if few else p.x_copies * tall * width * size * (h - 1) / h

    def summed(width):
        return p.x_copies * (2 * p.rows if few else tall) * width * _WORD * (h - 1) / h

    rounds, turned = _rounds(p), h == w and p.wafer.machine is None
    options = {"rows": p.rows} | ({"rounds": rounds} if rounds > 1 else {})
    options |= {"turned": True} if turned else {}
    met = p.x_copies * p.rows * -(-p.meeting // h) * p.x_bytes
    moved = {
        "nn": gathered(wide_x, p.x_bytes) + met + summed(wide_s),
        "nt": gathered(wide_s, p.s_bytes) + 2 * met * (w - 1) / w + summed(wide_x),
        "tn": gathered(wide_x, p.x_bytes) + met + gathered(wide_s, p.s_bytes),
    }[p.form]
    if turned:
        moved -= (met if p.form != "nt" else 2 * met * (w - 1) / w) - p.x
    return Candidate(
        plan=Plan("stationary", tuple(options.items())),
        words=moved / _WORD,
        steps=3 * rounds,
        hops=(2 * h + w) * rounds,
        held_bytes=(p.x_copies * p.rows * wide_x * p.x_bytes + met) / rounds,
        rounds=rounds,
        note=f"in {rounds} rounds" if rounds > 1 else "",
    )


def _over_wafers(p: Problem) -> Candidate:
    wafer, wafers = p.wafer, p.wafer.wafers
    one = dataclasses.replace(p, meeting=-(-p.meeting // wafers))
    inner = _mesh(one) if cannon.serves(wafer.height, wafer.width) else _allgather(one)
    made = Plan("2.5d", (("inner", inner.plan),), inner.plan.unit * wafers)
    if wafers == 1:
        return Candidate(plan=made, refused="needs more than one wafer, there is one")
    if p.batched:
        return Candidate(
            plan=made, refused="is for matrices that all wafers hold; a has leading dimensions"
        )
    if inner.refused or not cannon.serves(wafer.height, wafer.width):
        return Candidate(plan=made, refused=_mesh(p).refused)
    joined = {"nn": 2 * p.s, "nt": p.x, "tn": p.y}[p.form]  # a sum over the wafers, or a gather
    return dataclasses.replace(
        inner,
        plan=made,
        words=inner.words + joined * (wafers - 1) / wafers / _WORD,
        steps=inner.steps + 1,
        note=f"{inner.plan.algorithm} on each wafer",
    )


def problem(form: Form, a, bs, wafer: Wafer) -> Problem:
    """The triple of the product `form` of `a` and all `bs` (anything with a shape and a dtype)."""
    leading = a.shape[:-2] or bs[0].shape[:-2]
    copies = math.prod(leading[1:]) * -(-leading[0] // wafer.wafers) if leading else 1
    of_b = sum(b.shape[-1 if form != "nt" else -2] for b in bs)
    size_a, size_b = a.dtype.itemsize, bs[0].dtype.itemsize
    y_copies = copies if form == "tn" or bs[0].ndim > 2 else 1
    rows, meeting, columns, x, y, s = {
        "nn": (a.shape[-2], a.shape[-1], of_b, size_a, size_b, size_a),
        "nt": (a.shape[-2], of_b, a.shape[-1], size_a, size_b, size_a),
        "tn": (a.shape[-2], a.shape[-1], of_b, size_a, size_a, size_b),
    }[form]
    return Problem(
        form=form,
        rows=rows,
        meeting=meeting,
        columns=columns,
        x_bytes=x,
        y_bytes=y,
        s_bytes=s,
        x_copies=copies,
        y_copies=y_copies,
        batched=bool(leading),
        wafer=wafer,
    )
