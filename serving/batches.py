"""Fill the arrays of a step from the requests that it serves."""

from collections.abc import Sequence

import numpy as np

from serving.programs import DeviceSizes, Shape
from serving.sampler import Rows
from serving.scheduler import Stream
from serving.steps import Batch


def empty_batch(shape: Shape, sizes: DeviceSizes) -> Batch:
    """The tokens of a step that has none yet, as NumPy arrays to be filled."""
    return Batch(
        tokens=np.zeros((shape.B, shape.T), np.int32),
        positions=np.full((shape.B, shape.T), -1, np.int32),
        tables=np.zeros((shape.B, sizes.columns), np.int32),
        slots=np.full(shape.B, sizes.slots, np.int32),
        chooses=np.array(True),
    )


def place(
    batch: Batch, b: int, stream: Stream, tokens: Sequence[int] | np.ndarray, begin: int
) -> None:
    """Writes tokens of a request into sequence `b` of a step.

    Args:
      batch: is changed.
      b: which sequence.
      stream: has a slot, and pages for the tokens.
      tokens: one after another; -1 is the newest of the slot.
      begin: position of the first of them.
    """
    batch.tokens[b, : len(tokens)] = tokens
    batch.positions[b, : len(tokens)] = begin + np.arange(len(tokens))
    batch.tables[b, : len(stream.pages)] = stream.pages
    batch.slots[b] = stream.slot


def set_row(rows: Rows, row: int, stream: Stream, position: int, vocab: int) -> None:
    """Says how a request chooses its token.

    Args:
      rows: is changed.
      row: which of them.
      stream: the request.
      position: of the token that is chosen.
      vocab: of the model.
    """
    params = stream.params
    rows.slots[row], rows.seeds[row] = stream.slot, stream.seed
    rows.positions[row], rows.temperature[row] = position, params.temperature
    if params.temperature > 0:
        rows.top_k[row] = min(params.top_k or vocab, vocab)
        rows.top_p[row], rows.min_p[row] = params.top_p, params.min_p
