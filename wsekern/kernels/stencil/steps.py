"""Many steps of a stencil in one compiled loop, on one PE's padded tiles; per PE.

Two padded buffers take turns: a step reads one and writes the other in place. So no step copies a
field, and the compiler, which cannot fuse through a write in place, evaluates no step twice.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, boundary, cpu_fusion, remat, sources
from wsekern.kernels.stencil.buffers import Mode, Pairs, Step, Tile, Tiles, cut_box, pad_tile
from wsekern.kernels.stencil.exchange import concatenate_halo, exchange
from wsekern.kernels.stencil.geometry import Lines
from wsekern.kernels.stencil.plan import StencilPlan
from wsekern.kernels.stencil.sources import Emitters, Readers, Records, join_records
from wsekern.kernels.stencil.traced_update import TracedUpdate

Carry = TypeVar("Carry", bound=Tiles | tuple[Tiles, Tiles])  # tiles, or two buffers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("coefficients", "emitters", "readers"),
    meta_fields=("plan", "update"),
)
@dataclasses.dataclass(frozen=True)
class StencilRun:
    """A plan, its traced update, and the arrays that its steps read."""

    plan: StencilPlan
    update: TracedUpdate
    coefficients: tuple[Any, ...]  # arrays, or what stands for them while a pytree is taken apart
    emitters: Emitters | None
    readers: Readers | None

    def advance(self, tiles: Tiles, begin: Step, steps: int) -> tuple[Tiles, Records]:
        """The tiles `steps` steps later, and what the receivers on this PE read."""
        # After a unit the fields lie in the buffer where they began, as the carry of a loop must.
        unit = self.plan.unit
        done = steps // unit * unit
        buffers = self.two_buffers(tiles)
        buffers, first = self.loop(self.take_steps, buffers, begin, steps // unit, unit)
        mode = Mode.PADDED if done == 0 else None  # else a loop has had the buffers
        buffers, last = self.take_steps(buffers, begin + done, steps - done, first_mode=mode)
        return self.tiles(buffers[0]), join_records(first, last)

    def loop(
        self,
        body: Callable[[Carry, Step, int], tuple[Carry, Records]],
        carry: Carry,
        begin: Step,
        times: int,
        unit: int,
    ) -> tuple[Carry, Records]:
        """`body`, of `unit` steps, repeated; and all its records in order."""
        if times == 0:  # XLA would compile the body all the same
            return carry, self._stack([])
        # Arrays, so that XLA does not know the numbers of steps: `cpu_fusion` relies on it.
        begins = begin + unit * jnp.arange(times, dtype=jnp.int32)
        carry, records = lax.scan(lambda c, b: body(c, b, unit), carry, begins)
        return carry, None if records is None else records.reshape(times * unit, records.shape[-1])

    def take_steps(
        self,
        buffers: tuple[Tiles, Tiles],
        begin: Step,
        steps: int,
        first_mode: Mode | None = None,
    ) -> tuple[tuple[Tiles, Tiles], Records]:
        """`steps` steps unrolled, with an exchange before each `depth` of them.

        Args:
          buffers: what is read first, and what is written first.
          begin: the number of the first step.
          steps: how many.
          first_mode: of the first exchange, if it differs from the plan's mode.
        """
        plan, records = self.plan, []
        now, other = buffers
        for j in range(steps):
            left, step = plan.steps_left(j, steps), begin + j
            mode = plan.mode
            # JOINED has no buffers, and on a wafer every exchange is PADDED already.
            if j == 0 and first_mode is not None and mode is Mode.CARRIED:
                mode = first_mode
            before = now
            if plan.exchanges_before(j):
                now = self._exchange_halos(now, mode)
            now = self._fill_ghosts(now, left, step, mode)
            boxes = [(now, plan.region(left))]
            if plan.exchanges_before(j) and plan.overlap:
                # The inside is computed from what was there before the exchange: it waits for none.
                inside, *rims = plan.boxes(left)
                early = self._fill_ghosts(before, left, step, mode)
                boxes = [(early, inside), *((now, rim) for rim in rims)]
            new = [(self._update_box(fields, box, step), box) for fields, box in boxes]
            # Take turns: the buffer that was read is the one that the next step overwrites.
            now, other = self._write_boxes(now, other, new, step, mode), now
            records += self._records(now)
        return (now, other), self._stack(records)

    def take_steps_reverse(
        self, now: Tiles, begin: Step, steps: int
    ) -> tuple["StencilRun", Tiles, Records]:
        """As `take_steps`, to be differentiated in reverse; the buffers are in new memory.

        The run comes back too: `adjoint.apply_gathering` passes its coefficients on.
        """
        run, plan, mode, records = self, self.plan, Mode.REVERSE, []
        for j in range(steps):
            left, step = plan.steps_left(j, steps), begin + j
            region = plan.region(left)
            if plan.exchanges_before(j):
                now = run._exchange_halos(now, mode)
            now = run._fill_ghosts(now, left, step, mode)
            # Zeros, not the buffer of the step before: what is overwritten would need a cotangent.
            other = tuple(jnp.zeros_like(b) for b in now)
            update = functools.partial(run._new_cells, box=region, step=step)
            # Kept are the fields before a step; what the update needs of them is computed again.
            gather = jax.checkpoint(functools.partial(adjoint.apply_gathering, update))
            new, coefficients = gather(list(now), list(run.coefficients))
            run = dataclasses.replace(run, coefficients=tuple(coefficients))
            now = run._write_boxes(now, other, [(new, region)], step, mode)
            records += run._records(now)
        return run, now, run._stack(records)

    def varying(self) -> "StencilRun":
        """This run with its arrays typed as each PE's own, whose gradient is summed once."""
        # Without this cast JAX inserts one at every use, and each sums a gradient over all PEs.
        axes = tuple(axis for line in self.plan.lines[0] if line.split for axis in line.axes)
        return fabric.varying(self, axes)

    def two_buffers(self, tiles: Tiles) -> tuple[Tiles, Tiles]:
        buffers = tuple(pad_tile(t, self.plan.padding) for t in tiles)
        # One array twice: XLA copies it at the first write, and from then on they are two.
        return buffers, buffers

    def tiles(self, buffers: Tiles) -> Tiles:
        """The tiles without their padding."""
        none = ((0, 0),) * len(self.plan.radius)
        whole = tuple((0, line.tile) for line in self.plan.lines[0])
        return tuple(cut_box(b, self.plan.padding, whole, none) for b in buffers)

    def _exchange_halos(self, now: Tiles, mode: Mode) -> Tiles:
        """The buffers with their neighbors' cells."""
        plan = self.plan
        if mode is Mode.JOINED:  # the halo comes with the update's windows
            return now
        paddings = [plan.padding] * len(now)
        corners = bool(plan.corners)
        return tuple(exchange(now, plan.lines, paddings, mode=mode, corners=corners))

    def _fill_ghosts(self, now: Tiles, left: int, step: Step, mode: Mode) -> Tiles:
        """The buffers with the ghost cells that the next `left` steps read."""
        plan = self.plan
        if mode is Mode.JOINED:
            return now
        # In reverse `adjoint` looks for slices, which a branch would hide from it.
        counter = step if plan.platform == "cpu" and mode is not Mode.REVERSE else None
        filled = boundary.fill(
            now,
            plan.lines,
            padding=plan.padding,
            margins=plan.margins(left),
            radius=plan.radius,
            mode=mode,
            cpu_counter=counter,
        )
        return tuple(filled)

    def _update_box(self, now: Tiles, box: Pairs, step: Step) -> list[Tile]:
        """The cells `box` of the new fields, on CPUs with every shared array computed once."""
        # The windows are cut inside: as operands of a branch they would be copied out first.
        new_cells = functools.partial(self._new_cells, box=box, step=step)
        counter = step if self.plan.platform == "cpu" else None
        return cpu_fusion.compute_once(new_cells, counter, *now, *self.coefficients)

    def _new_cells(self, *operands: Tile, box: Pairs, step: Step) -> list[Tile]:
        """The cells `box` of the new fields, from buffers and coefficients."""
        plan = self.plan
        fields, coefficients = operands[: len(plan.lines)], operands[len(plan.lines) :]
        if plan.mode is Mode.JOINED:
            corners = bool(plan.corners)
            windows = concatenate_halo(fields, plan.lines, plan.radius, corners=corners)
        else:
            windows = [cut_box(b, plan.padding, box, plan.radius) for b in fields]
        return self.update(windows, _coefficient_windows(plan, coefficients, box), step)

    def _write_boxes(
        self,
        now: Tiles,
        other: Tiles,
        parts: Iterable[tuple[Sequence[Tile], Pairs]],
        step: Step,
        mode: Mode,
    ) -> Tiles:
        """The new cells of some boxes in `other`'s memory, sources added, `now`'s rim if fixed."""
        plan, buffers = self.plan, list(other)
        for new, box in parts:
            if mode is Mode.JOINED:  # one box, the whole tile, and no buffer to write into
                buffers = list(new)
                continue
            starts = [low + begin for (low, _), (begin, _) in zip(plan.padding, box, strict=True)]
            buffers = [
                lax.dynamic_update_slice(b, n, starts) for b, n in zip(buffers, new, strict=True)
            ]
        # After the write, because the update makes the cells of the rim too.
        buffers = [
            boundary.hold_rim(
                buffer, old, field, padding=plan.padding, radius=plan.radius, mode=mode
            )
            for buffer, old, field in zip(buffers, now, plan.lines, strict=True)
        ]
        if self.emitters is not None:
            buffers = sources.emit(self.emitters, buffers, plan.lines[0], plan.padding, step)
        return tuple(buffers)

    def _records(self, now: Tiles) -> list[Shaped[Array, " points"]]:
        """This step's records in a list, which is empty without receivers."""
        if self.readers is None:
            return []
        return [sources.read(self.readers, now, self.plan.lines[0], self.plan.padding)]

    def _stack(self, records: Sequence[Shaped[Array, " points"]]) -> Records:
        if self.readers is None:
            return None
        return jnp.stack(records) if records else jnp.zeros((0, self.readers.count))


def prepare(
    plan: StencilPlan,
    fields: Sequence[Tile],
    coefficients: Sequence[Tile],
    emitters: Emitters | None,
    readers: Readers | None,
) -> StencilRun:
    """The run of a plan: coefficients with their halos, and the update traced and checked.

    Raises:
      ValueError: as `TracedUpdate.jaxpr`.
    """
    update = TracedUpdate(plan)
    run = StencilRun(plan, update, _with_halos(plan, coefficients), emitters, readers)
    # Before tracing: over which axes an array varies is part of its type.
    if plan.checkpoint is not None and not plan.on_wafer:
        run = run.varying()
    # All sizes at once, so that whatever is wrong with the update shows up here, in a short stack;
    # the largest first, because smaller ones can be made of it.
    regions = [plan.region(left) for left in range(plan.depth, 0, -1)]
    boxes = [*regions, *(plan.boxes(plan.depth) if plan.overlap else [])]
    jaxprs = []

    def trace(fields: Sequence[Tile], coefficients: Sequence[Tile]) -> None:
        for box in boxes:
            windows = _windows_as_large(plan, fields, box)
            of_coefficients = _coefficient_windows(plan, coefficients, box)
            jaxprs.append(update.jaxpr(windows, of_coefficients, jnp.int32(0)))

    # Nothing is computed. But a `ShapeDtypeStruct` of a window would not do: where only some axes
    # of a mesh are mapped over, jax 0.10 cannot read its type.
    jax.eval_shape(trace, fields, run.coefficients)
    if plan.corners is None:  # depth 1: deeper halos have corners in any case
        corners = update.reads_corners(jaxprs[0])
        run = dataclasses.replace(run, plan=dataclasses.replace(plan, corners=corners))
    return run


def run_steps(run: StencilRun, fields: Sequence[Tile]) -> tuple[Tiles, Tiles | None, Records]:
    """The tiles after all steps, snapshots, and what the receivers on this PE read."""
    plan = run.plan
    advance = run.advance if plan.checkpoint is None else functools.partial(remat.advance, run)
    every = plan.save_every
    if every is None:
        tiles, record = advance(tuple(fields), 0, plan.steps)
        return tiles, None, record

    def save(tiles: Tiles, begin: Step) -> tuple[Tiles, tuple[Tiles, Records]]:
        tiles, record = advance(tiles, begin, every)
        return tiles, (tiles, record)

    # Steps after the last snapshot are taken outside the loop.
    times = plan.steps // every
    begins = jnp.arange(times, dtype=jnp.int32) * every
    tiles, (saved, records) = lax.scan(save, tuple(fields), begins)
    done = times * every
    tiles, last = advance(tiles, done, plan.steps - done)
    if records is not None:
        records = records.reshape(done, records.shape[-1])
    return tiles, saved, join_records(records, last)


def _with_halos(plan: StencilPlan, coefficients: Sequence[Tile]) -> Tiles:
    """The coefficients, those that are split with as deep a halo as the fields."""
    # Coefficients do not change, so one exchange before the first step serves all of them.
    result = list(coefficients)
    split = [(i, lines) for i, lines in enumerate(plan.coefficient_lines) if lines is not None]
    lines = [lines for _, lines in split]
    margins = [_coefficient_widths(l, plan.margins(plan.depth)) for l in lines]
    buffers = [pad_tile(result[i], m) for (i, _), m in zip(split, margins, strict=True)]
    if buffers:
        buffers = exchange(buffers, lines, margins, mode=Mode.PADDED)
    for (i, field), buffer, m in zip(split, buffers, margins, strict=True):
        [result[i]] = boundary.fill(
            [buffer], [field], padding=m, margins=m, radius=m, mode=Mode.PADDED
        )
    return tuple(result)


def _coefficient_windows(plan: StencilPlan, coefficients: Sequence[Tile], box: Pairs) -> list[Tile]:
    """What the update reads of the coefficients to make the cells `box`."""
    margins = plan.margins(plan.depth)
    windows = []
    for coefficient, lines in zip(coefficients, plan.coefficient_lines, strict=True):
        if lines is None:  # whole on every PE
            windows.append(coefficient)
            continue
        cells = tuple(
            (0, 1) if line.size == 1 else pair for line, pair in zip(lines, box, strict=True)
        )
        padding, radius = (_coefficient_widths(lines, w) for w in (margins, plan.radius))
        windows.append(cut_box(coefficient, padding, cells, radius))
    return windows


def _coefficient_widths(lines: Lines, widths: Pairs) -> Pairs:
    """`widths`, but 0 along dimensions where one cell stands for all."""
    return tuple((0, 0) if l.size == 1 else pair for l, pair in zip(lines, widths, strict=True))


def _windows_as_large(plan: StencilPlan, tiles: Sequence[Tile], box: Pairs) -> list[Tile]:
    """Windows as large as those from which the update makes the cells `box`, of any values."""
    # A negative width cuts. This pad is only a short way to write the window's shape.
    grown = [
        (low - begin, end + high - line.tile, 0)
        for (begin, end), (low, high), line in zip(box, plan.radius, plan.lines[0], strict=True)
    ]
    return [lax.pad(t, jnp.zeros((), t.dtype), grown) for t in tiles]
