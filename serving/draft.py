"""A small model guesses the next tokens of few requests, for the large one to verify.

Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. The small
model draws with the random numbers of the large one: where they agree on the probabilities, they
agree on the token. What is verified decides alone, so the text does not depend on the draft.
"""

from collections.abc import Sequence

import numpy as np

from serving.batches import empty_batch, place, set_row
from serving.programs import Programs, Shape, empty_rows
from serving.sampler import Chosen
from serving.scheduler import Stream

DRAFTED = 4  # tokens that are guessed at once
_READ_TOKENS = 32  # of a text that one step reads


class Draft:
    """A small model with a cache of its own, in the pages that requests have in the large one's.

    Args:
      programs: of the small model; their pages are those of the large one's cache.
      most: requests that guess at once.
      context: tokens of the small model's context.
    """

    def __init__(self, programs: Programs, *, most: int, context: int) -> None:
        self._programs, self._context = programs, context
        self._read = Shape(1, _READ_TOKENS)
        # Two tokens a sequence: after guesses that were all right, the last of them is not read.
        self._steps = [Shape(1 << i, 2) for i in range((most - 1).bit_length() + 1)]
        for shape in (self._read, *self._steps):
            programs.prepare(shape)
        self._hash_of: dict[int, bytes] = {}  # of the pages that the small model has read

    def guess(self, streams: Sequence[Stream], most: Sequence[int]) -> list[list[int]]:
        """What the small model says next.

        Args:
          streams: requests whose tokens are all known; each has pages for the guesses.
          most: tokens to guess for each.

        Returns:
          Up to `DRAFTED` tokens for each.
        """
        counts = [
            min(DRAFTED, n) if stream.length + DRAFTED <= self._context else 0
            for stream, n in zip(streams, most, strict=True)
        ]
        steps = max(counts, default=0)
        if steps == 0:
            return [[] for _ in streams]
        for stream in streams:
            self._catch_up(stream)
        shape = next(shape for shape in self._steps if len(streams) <= shape.B)
        chosen = [self._step(shape, streams, ahead) for ahead in range(steps)]
        tokens = np.stack([np.asarray(one.tokens) for one in chosen], axis=1)
        for stream in streams:
            self._note(stream, stream.length)
        return [tokens[b, :count].tolist() for b, count in enumerate(counts)]

    def judge(self, stream: Stream, guessed: int, right: int) -> None:
        """Takes note that the first `right` guesses stand in the text: they are read already."""
        # The last guess was not read: nothing was asked for after it.
        stream.drafted += min(right, guessed - 1)

    def _catch_up(self, stream: Stream) -> None:
        """Reads what the small model has not seen, but for the newest one or two tokens."""
        size = self._programs.sizes.page_tokens
        if stream.drafted == 0:
            for page, hashed in zip(stream.pages, stream.hashes, strict=False):
                if self._hash_of.get(page) != hashed:
                    break
                stream.drafted += size
            stream.drafted = min(stream.drafted, stream.length - 1)
        while stream.length - stream.drafted > 2:
            end = min(stream.drafted + self._read.T, stream.length - 1)
            batch = empty_batch(self._read, self._programs.sizes)
            batch.chooses[...] = False
            place(batch, 0, stream, stream.text[stream.drafted : end], stream.drafted)
            self._programs.run(self._read, batch, empty_rows(1, self._programs.vocab))
            self._note(stream, end)

    def _step(self, shape: Shape, streams: Sequence[Stream], ahead: int) -> Chosen:
        """Reads the newest tokens, or the last guess, and guesses one more."""
        batch = empty_batch(shape, self._programs.sizes)
        rows = empty_rows(shape.rows, self._programs.vocab)
        for b, stream in enumerate(streams):
            end = stream.length + ahead
            if ahead:
                place(batch, b, stream, [-1], end - 1)
            else:
                place(batch, b, stream, stream.text[stream.drafted : end], stream.drafted)
            set_row(rows, b, stream, end, self._programs.vocab)
        return self._programs.run(shape, batch, rows)

    def _note(self, stream: Stream, end: int) -> None:
        """Takes note that the small model has read a text up to `end`."""
        size = self._programs.sizes.page_tokens
        for page in range(stream.drafted // size, min(end // size, len(stream.hashes))):
            self._hash_of[stream.pages[page]] = stream.hashes[page]
        stream.drafted = end
