"""Launch the steps of running requests, and take in the tokens that they bring.

Decoding steps are launched before the tokens of the step before are read: these stay on the device.
Only requests whose next step depends on the token itself wait for it: those with a grammar, and
those that guess ahead.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from serving.programs import Programs, Shape, empty_rows
from serving.request import Delta, Finish, Matcher, TokenLogprobs
from serving.sampler import Chosen, Extras, Rows, count_prompt, no_extras
from serving.scheduler import Scheduler, Stream
from serving.steps import Batch

READ_TOKENS = 32  # of a prompt that one step reads
GUESSES = 7  # tokens that are verified at once
MOST_GUESSING = 4  # requests that guess; more of them use the machine as well without


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launched:
    """A step that is launched, whose tokens are not read yet."""

    shape: Shape
    streams: Sequence[Stream]
    chosen: Chosen
    # Of each stream, the guesses that are verified; None for a step without.
    guesses: list[tuple[list[int], bool]] | None = None


Deliver = Callable[[Stream, Delta], None]


class Launcher:
    """The steps of an engine: which are launched, and what becomes of their tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        programs: Programs,
        shapes: Sequence[Shape],
        deliver: Deliver,
        *,
        guesses: bool,
        chunk: int,
    ) -> None:
        """No step is launched yet.

        Args:
          scheduler: knows the requests.
          programs: has a program for each of `shapes`.
          shapes: of steps; those of one token a sequence may be padded to several.
          deliver: called with the new tokens of a request.
          guesses: whether requests guess ahead by prompt lookup.
          chunk: tokens of prompts that are read between two decoding steps.
        """
        self._scheduler, self._programs, self._deliver = scheduler, programs, deliver
        self._guesses, self._chunk = guesses, chunk
        self._reads = sorted((s for s in shapes if s.B == 1 and not s.every), key=lambda s: s.T)
        decodes = sorted(s for s in shapes if not s.every and s.T < READ_TOKENS)
        # An engine of one stream may have no shape for decoding but that which reads prompts.
        self._decodes = decodes or self._reads
        self._verifies = sorted(s for s in shapes if s.every)
        self._steps: collections.deque[_Launched] = collections.deque()
        self.totals: collections.Counter[str] = collections.Counter()

    @property
    def is_idle(self) -> bool:
        """Whether no step is launched and no request runs or waits."""
        return not (self._steps or self._scheduler.running or self._scheduler.waiting)

    def advance(self) -> None:
        """Launches what can be launched, and reads what is done."""
        for stream in self._scheduler.admit():
            stream.generation.usage.started = stream.generation.usage.started or time.monotonic()
        launched = self._read_prompts()
        launched |= self._decode()
        # The newest step runs on while the tokens of those before are read.
        self._collect(leave=1 if launched else 0)

    def finish(self, stream: Stream, finish: Finish, error: str = "") -> None:
        """Ends a request, at once: steps that are launched with it bring it nothing more."""
        if not stream.is_finished:
            self._scheduler.keep_pages(stream)
            self._scheduler.remove(stream)
            stream.generation.usage.finished = time.monotonic()
            self.totals[f"finished_{finish}"] += 1
            self._deliver(stream, Delta(finish=finish, error=error))

    def _read_prompts(self) -> bool:
        budget = self._chunk
        launched = False
        while budget > 0 and (stream := self._scheduler.next_to_read()) is not None:
            if not stream.pages:
                self._begin(stream)
                if not stream.reads:
                    continue
            tokens = min(stream.length - stream.computed, self._reads[-1].T)
            if not self._provide(stream, stream.computed + tokens):
                continue
            self._read(stream, tokens)
            budget -= tokens
            launched = True
        return launched

    def _begin(self, stream: Stream) -> None:
        cached = self._scheduler.find_prefix(stream)
        usage = stream.generation.usage
        if not stream.made:
            usage.cached_tokens = cached
        self.totals["cached_tokens"] += cached
        self.totals["prompt_tokens"] += stream.length
        if _is_penalized(stream):
            assert stream.slot is not None
            prompt, text = np.split(stream.tokens, [stream.prompt_tokens])
            counts = count_prompt(self._programs.vocab, prompt, text)
            self._programs.set_counts(stream.slot, counts)

    def _read(self, stream: Stream, tokens: int) -> None:
        shape = next(s for s in self._reads if tokens <= s.T)
        batch = self._empty_batch(shape)
        begin, end = stream.computed, stream.computed + tokens
        batch.tokens[0, :tokens] = stream.text[begin:end]
        batch.positions[0, :tokens] = np.arange(begin, end)
        ends = end == stream.length
        batch.chooses[...] = ends
        self._fill_sequence(batch, 0, stream)
        rows, extras = self._rows_of(shape, [(0, stream, end)] if ends else [])
        chosen = self._programs.run(shape, batch, rows, extras)
        self.totals["steps"] += 1
        if stream.is_finished:
            return
        stream.computed = end
        if ends:
            stream.in_flight = 1
            self._steps.append(_Launched(shape=shape, streams=[stream], chosen=chosen))
        self._scheduler.keep_pages(stream)

    def _decode(self) -> bool:
        decoding = [s for s in self._scheduler.running if not s.reads]
        guessing = self._guesses and len(decoding) <= MOST_GUESSING and bool(self._verifies)
        ready = []
        for stream in decoding:
            waits = stream.params.matcher is not None or (guessing and stream.lookup is not None)
            if stream.room > 0 and not (waits and stream.in_flight):
                ready.append(stream)
        ready = [s for s in ready if self._provide(s, s.computed + 1)]
        ready = [s for s in ready if s.slot is not None and not s.reads]  # none that was retracted
        if not ready:
            return False
        guesses = [self._guess(stream) if guessing else ([], False) for stream in ready]
        if any(tokens for tokens, _ in guesses):
            self._verify(ready, guesses)
        else:
            most = self._decodes[-1].B
            for begin in range(0, len(ready), most):
                self._decode_together(ready[begin : begin + most])
        return True

    def _decode_together(self, streams: list[Stream]) -> None:
        shape = next(s for s in self._decodes if len(streams) <= s.B)
        batch = self._empty_batch(shape)
        for row, stream in enumerate(streams):
            known = stream.text[stream.length - 1] if not stream.in_flight else -1
            batch.tokens[row, 0] = known
            batch.positions[row, 0] = stream.computed
            self._fill_sequence(batch, row, stream)
        listed = [(row, stream, stream.computed + 1) for row, stream in enumerate(streams)]
        rows, extras = self._rows_of(shape, listed)
        chosen = self._programs.run(shape, batch, rows, extras)
        for stream in streams:
            stream.computed += 1
            stream.in_flight += 1
        self._steps.append(_Launched(shape=shape, streams=streams, chosen=chosen))
        self.totals["steps"] += 1

    def _guess(self, stream: Stream) -> tuple[list[int], bool]:
        """The tokens that may come next, and whether they are of the request's prediction."""
        if stream.lookup is None or stream.in_flight:
            return [], False
        tokens, predicted = stream.lookup.guess(min(GUESSES, stream.room - 1))
        if stream.params.matcher is not None:
            tokens = _allowed(stream.params.matcher, tokens)
        if not self._scheduler.provide(stream, stream.computed + 1 + len(tokens)):
            return [], False  # no page: not worth taking one from another request
        return tokens, predicted

    def _verify(self, streams: list[Stream], guesses: list[tuple[list[int], bool]]) -> None:
        shape = next(s for s in self._verifies if len(streams) <= s.B)
        batch = self._empty_batch(shape)
        listed = []
        for b, (stream, (tokens, _)) in enumerate(zip(streams, guesses, strict=True)):
            count = 1 + len(tokens)
            batch.tokens[b, :count] = [stream.text[stream.length - 1], *tokens]
            batch.positions[b, :count] = stream.computed + np.arange(count)
            self._fill_sequence(batch, b, stream)
            listed += [(b * shape.T + t, stream, stream.computed + 1 + t) for t in range(count)]
        rows, extras = self._rows_of(shape, listed, dict(zip(streams, guesses, strict=True)))
        chosen = self._programs.run(shape, batch, rows, extras)
        for stream in streams:
            stream.in_flight = 1
        self._steps.append(_Launched(shape=shape, streams=streams, chosen=chosen, guesses=guesses))
        self.totals["steps"] += 1

    def _provide(self, stream: Stream, tokens: int) -> bool:
        """Whether the stream has its pages, perhaps after the youngest request gave up its own."""
        while not self._scheduler.provide(stream, tokens):
            if self._steps:
                self._collect(leave=0)  # a request that is retracted must not lose a token
                if stream.is_finished:
                    return False
                continue
            youngest = self._scheduler.youngest()
            self._scheduler.retract(youngest)
            if youngest is stream:
                return False
        return True

    def _empty_batch(self, shape: Shape) -> Batch:
        sizes = self._programs.sizes
        return Batch(
            tokens=np.zeros((shape.B, shape.T), np.int32),
            positions=np.full((shape.B, shape.T), -1, np.int32),
            tables=np.zeros((shape.B, sizes.columns), np.int32),
            slots=np.full(shape.B, sizes.slots, np.int32),
            chooses=np.array(True),
        )

    def _fill_sequence(self, batch: Batch, row: int, stream: Stream) -> None:
        batch.tables[row, : len(stream.pages)] = stream.pages
        batch.slots[row] = stream.slot

    def _rows_of(
        self,
        shape: Shape,
        listed: Sequence[tuple[int, Stream, int]],
        guesses: dict[Stream, tuple[list[int], bool]] | None = None,
    ) -> tuple[Rows, Extras | None]:
        """How the tokens of a step are chosen.

        Args:
          shape: of the step.
          listed: a row, its stream, and the position of the token that is chosen.
          guesses: of each stream, where they are verified.
        """
        rows = empty_rows(shape.rows, self._programs.vocab)
        extras: Extras | None = None
        for row, stream, position in listed:
            params = stream.params
            rows.slots[row], rows.seeds[row] = stream.slot, stream.seed
            rows.positions[row], rows.temperature[row] = position, params.temperature
            if params.temperature > 0:
                rows.top_k[row] = min(params.top_k or self._programs.vocab, self._programs.vocab)
                rows.top_p[row], rows.min_p[row] = params.top_p, params.min_p
            rows.frequency[row], rows.presence[row] = (
                params.frequency_penalty,
                params.presence_penalty,
            )
            rows.repetition[row] = params.repetition_penalty
            rows.penalized[...] |= _is_penalized(stream)
            rows.logprobs[...] |= params.logprobs is not None
            biases = dict(params.logit_bias)
            if position - stream.prompt_tokens < params.min_tokens:
                biases |= dict.fromkeys(params.stop_tokens, -np.inf)
            if biases or params.matcher is not None:
                extras = extras or no_extras(shape.rows, self._programs.vocab)
            if biases and extras is not None:
                rows.biased[...] = True
                extras.bias_tokens[row, : len(biases)] = list(biases)
                extras.bias[row, : len(biases)] = list(biases.values())
        for stream in {stream: None for _, stream, _ in listed}:
            if stream.params.matcher is not None and extras is not None:
                rows.masked[...] = True
                own = [row for row, one, _ in listed if one is stream]
                guess, _ = (guesses or {}).get(stream, ([], False))
                try:
                    _fill_masks(stream.params.matcher, extras.mask, own, guess)
                except ValueError as error:  # beyond the grammar's limits; the others go on
                    self.finish(stream, "error", str(error))
        return rows, extras

    def _collect(self, leave: int) -> None:
        """Reads the tokens of all steps but the newest `leave`."""
        while len(self._steps) > leave:
            step = self._steps.popleft()
            chosen = Chosen(*map(np.asarray, step.chosen))
            for i, stream in enumerate(step.streams):
                if stream.is_finished:
                    continue
                stream.in_flight -= 1
                if step.guesses is None:
                    self._take(stream, chosen, [i])
                    continue
                guess, predicted = step.guesses[i]
                self._take_verified(stream, chosen, i * step.shape.T, guess, predicted)

    def _take_verified(
        self, stream: Stream, chosen: Chosen, first: int, guess: list[int], predicted: bool
    ) -> None:
        right = 0
        while right < len(guess) and chosen.tokens[first + right] == guess[right]:
            right += 1
        stream.computed += 1 + right
        usage = stream.generation.usage
        self.totals["guessed_tokens"] += len(guess)
        self.totals["accepted_tokens"] += right
        if predicted:
            usage.accepted_tokens += right
            usage.rejected_tokens += len(guess) - right
        if stream.lookup is not None:
            stream.lookup.judge(len(guess), right)
        self._take(stream, chosen, range(first, first + right + 1))

    def _take(self, stream: Stream, chosen: Chosen, rows: Sequence[int]) -> None:
        """Adds the tokens of these rows to a text, up to its end."""
        params, usage = stream.params, stream.generation.usage
        tokens: list[int] = []
        finish: Finish | None = None
        for row in rows:
            if not chosen.finite[row]:
                self.finish(stream, "error", "the model's logits are not finite")
                return
            token = int(chosen.tokens[row])
            if token in params.stop_tokens:
                finish = "stop"
                break
            if params.matcher is not None and not _accepts(params.matcher, token):
                finish = "stop"  # the grammar has no token left that may come
                break
            stream.text[stream.length] = token
            stream.length += 1
            tokens.append(token)
            if params.matcher is not None and params.matcher.is_complete:
                finish = "stop"
            if stream.length == len(stream.text):
                finish = finish or "length"
            if finish is not None:
                break
        usage.completion_tokens = stream.made
        usage.first_token = usage.first_token or time.monotonic()
        self.totals["generated_tokens"] += len(tokens)
        if stream.lookup is not None:
            stream.lookup.extend(tokens)
        self._scheduler.keep_pages(stream)
        logprobs = _logprobs(chosen, rows[: len(tokens)], params.logprobs)
        if tokens:
            self._deliver(stream, Delta(tokens=tuple(tokens), logprobs=logprobs))
        if finish is not None:
            self.finish(stream, finish)


def _is_penalized(stream: Stream) -> bool:
    params = stream.params
    penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty - 1)
    return any(penalties)


def _accepts(matcher: Matcher, token: int) -> bool:
    try:
        return matcher.accept(token)
    except ValueError:  # beyond its limits
        return False


def _allowed(matcher: Matcher, guess: list[int]) -> list[int]:
    """The guessed tokens up to the first that the grammar does not take."""
    count = 0
    try:
        while count < len(guess) and matcher.accept(guess[count]):
            count += 1
        matcher.rollback(count)
    except ValueError:  # beyond its limits: the mask of the next token says so
        return []
    return guess[:count]


def _fill_masks(matcher: Matcher, mask: np.ndarray, rows: list[int], guess: list[int]) -> None:
    """What the grammar allows in each row, each after one more of the guessed tokens."""
    for t, row in enumerate(rows):
        matcher.fill_mask(mask[row])
        if t < len(guess):
            matcher.accept(guess[t])
    matcher.rollback(min(len(guess), len(rows)))


def _logprobs(
    chosen: Chosen, rows: Sequence[int], alternatives: int | None
) -> tuple[TokenLogprobs, ...]:
    if alternatives is None:
        return ()
    return tuple(
        TokenLogprobs(
            float(chosen.logprobs[row]),
            tuple(
                (int(token), float(logprob))
                for token, logprob in zip(
                    chosen.top_tokens[row, :alternatives],
                    chosen.top_logprobs[row, :alternatives],
                    strict=True,
                )
                if logprob > -np.inf
            ),
        )
        for row in rows
    )
