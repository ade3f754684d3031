"""Find shapes of steps whose numbers are equal to the last bit, by trying them.

XLA's CPU backend sums a product of few rows, or of a small matrix, in another order than one of
many. So steps are padded to row counts that were found equal on this machine, for this model.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Literal

import jax
import numpy as np

from models.config import DecoderConfig
from serving.batches import empty_batch
from serving.launcher import GUESSES, MOST_GUESSING, MOST_READ_TOKENS, READ_TOKENS
from serving.programs import Programs, Shape, empty_rows
from wsekern.atomic_write import atomic_write

_ROWS = (2, 8, 16, 32)  # least rows of a step that are tried
_TEXT = 36  # tokens of the text that every shape reads
_READ = 28  # of these, how many are read before


def find_shapes(
    programs: Programs, max_streams: int, *, guesses: bool, chunk: int
) -> tuple[list[Shape], bool]:
    """The shapes that an engine uses, their programs prepared, and whether they are equal.

    Args:
      programs: of the model; its `least_rows` is set.
      max_streams: requests that run at once.
      guesses: whether guesses are verified.
      chunk: tokens of prompts that are read between two steps of decoding.
    """
    room = programs.sizes.columns * programs.sizes.page_tokens
    wide = [Shape(1, MOST_READ_TOKENS)] if min(chunk, room) >= MOST_READ_TOKENS else []
    if jax.default_backend() != "cpu":
        shapes = shapes_of(1, max_streams, guesses) + wide
        for shape in shapes:
            programs.prepare(shape)
        return shapes, False
    file = programs.file(f"equal{'-guesses' * guesses}{'-wide' * len(wide)}.json")
    known = _read(file)
    if known is not None:
        programs.least_rows, shapes = known
        for shape in shapes:
            programs.prepare(shape)
        return shapes, True
    for rows in _ROWS:
        programs.least_rows = rows
        shapes = shapes_of(rows, max_streams, guesses)
        reading = [shape for shape in shapes if shape.T == READ_TOKENS and not shape.every][0]
        programs.prepare(reading)
        expected = _numbers(programs, reading, reading)
        # The shapes with the fewest rows first: they are the likeliest to differ.
        unequal = []
        for shape in sorted(shapes, key=lambda s: s.B * s.T):
            programs.prepare(shape)
            if not _equal(expected, _numbers(programs, shape, reading)):
                unequal.append(shape)
                programs.forget(shape)
                if rows != _ROWS[-1]:
                    break
        if not unequal or rows == _ROWS[-1]:
            break
    for shape in wide:  # what it reads, narrow ones can read
        programs.prepare(shape)
        if _equal(expected, _numbers(programs, shape, reading)):
            shapes.append(shape)
        else:
            programs.forget(shape)
    programs.clear()
    shapes = [shape for shape in shapes if shape not in unequal]
    widest = max(shapes_of(rows, max_streams, guesses), key=lambda s: (not s.every, s.B))
    is_exact = widest in shapes
    if not is_exact:  # it is needed in any case
        programs.prepare(widest)
        shapes.append(widest)
    if is_exact and file is not None:
        _write(file, programs.least_rows, shapes)
    return shapes, is_exact


def scoring_shape(rows: int) -> Shape:
    """The shape that says how likely the tokens of a prompt are.

    Args:
      rows: of a step, at least.
    """
    return Shape(1, max(1 + GUESSES, rows), every=True)


def find_order(config: DecoderConfig, dtype: jax.typing.DTypeLike) -> Literal["in_out", "out_in"]:
    """The order of weights on a CPU: the faster one, if its products do not depend on the rows.

    Of some sizes, XLA's CPU backend sums a product of few rows in another order than one of 32.
    Where a weight is `[out, in]` it never did, but a step of one stream takes a tenth longer.

    Args:
      config: of the model.
      dtype: of its products.
    """
    inner = {(config.d_model, O) for O in (config.d_attention, config.d_kv, config.d_ff)}
    outer = {(I, config.d_model) for I in (config.d_attention, config.d_ff)}
    rng = np.random.default_rng(0)
    product = jax.jit(lambda x, weight: x @ weight)
    for I, O in sorted(inner | outer):
        x, weight = (
            jax.numpy.asarray(rng.standard_normal(shape, np.float32), dtype)
            for shape in ((32, I), (I, O))
        )
        whole = np.asarray(product(x, weight))
        if any((np.asarray(product(x[:rows], weight)) != whole[:rows]).any() for rows in (2, 8)):
            return "out_in"
    return "in_out"


def shapes_of(rows: int, max_streams: int, guesses: bool) -> list[Shape]:
    """All shapes of steps of at least so many rows.

    Args:
      rows: B T of a step, at least.
      max_streams: requests that run at once.
      guesses: whether guesses are verified.
    """
    shapes = {Shape(1, max(rows, READ_TOKENS))}
    streams = 1
    while True:
        shapes.add(Shape(streams, max(1, rows // streams)))
        if guesses and streams <= MOST_GUESSING:
            shapes.add(Shape(streams, max(1 + GUESSES, rows // streams), every=True))
        if streams >= min(max_streams, READ_TOKENS):
            return sorted(shapes)
        streams *= 2


def _numbers(programs: Programs, shape: Shape, reading: Shape) -> list[np.ndarray]:
    """What steps of a shape make of a text: keys, values, and the likeliest tokens of its end."""
    text = np.random.default_rng(0).integers(0, programs.sizes.vocab, _TEXT)
    _step(programs, reading, text, 0, _READ)
    if shape == reading:
        numbers = _step(programs, shape, text, _READ, _TEXT)
    else:
        width = shape.T if shape.every or shape.B == 1 else 1
        for begin in range(_READ, _TEXT, width):
            numbers = _step(programs, shape, text, begin, min(begin + width, _TEXT))
    pages = -(-_TEXT // programs.sizes.page_tokens)
    return [*numbers, *(x for page in range(pages) for x in programs.pages_of(page))]


def _step(
    programs: Programs, shape: Shape, text: np.ndarray, begin: int, end: int
) -> list[np.ndarray]:
    """Reads part of a text in every sequence of a step; the numbers of the last of them."""
    sizes, count = programs.sizes, end - begin
    batch = empty_batch(shape, sizes)
    batch.tables[:] = np.arange(sizes.columns) % sizes.pages
    batch.tokens[:, :count] = text[begin:end]
    batch.positions[:, :count] = np.arange(begin, end)
    rows = empty_rows(shape.rows, programs.vocab)
    rows.logprobs[...] = True
    rows.slots[:] = sizes.slots
    chosen = programs.run(shape, batch, rows)
    last = (shape.B - 1) * shape.T + count - 1 if shape.every else shape.B - 1
    return [np.asarray(x)[last] for x in (chosen.tokens, chosen.logprobs, chosen.top_logprobs)]


def _equal(a: Iterable[np.ndarray], b: Iterable[np.ndarray]) -> bool:
    return all(map(np.array_equal, a, b))


def _read(file: pathlib.Path | None) -> tuple[int, list[Shape]] | None:
    if file is None:
        return None
    try:
        known = json.loads(file.read_text())
        return known["least_rows"], [Shape(*shape) for shape in known["shapes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: pathlib.Path, least_rows: int, shapes: list[Shape]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(json.dumps({"least_rows": least_rows, "shapes": shapes}).encode())
    except OSError:
        pass  # found again at the next start
