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

from serving.batches import empty_batch, place, set_row
from serving.draft import DRAFTED, Draft
from serving.programs import Programs, Shape, empty_rows
from serving.request import Delta, Finish, Matcher, TokenLogprobs
from serving.sampler import Chosen, Extras, Rows, count_prompt, no_extras
from serving.scheduler import Scheduler, Stream
from serving.speculation import Guess

READ_TOKENS = 32  # of a prompt that one step reads
MOST_READ_TOKENS = 128  # that a step reads of a long one, where that changes no bit
GUESSES = 7  # tokens that are verified at once
MOST_GUESSING = 4  # requests that guess; more of them use the machine as well without


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launched:
    """A step that is launched, whose tokens are not read yet."""

    shape: Shape
    streams: Sequence[Stream]
    chosen: Chosen
    # Of each stream, the guesses that are verified; None for a step without.
    guesses: list[Guess] | None = None
    scored: int = 0  # tokens of a prompt that the step says the likelihood of; then it makes none


Deliver = Callable[[Stream, Delta], None]


class Launcher:
    """The steps of an engine: which are launched, and what becomes of their tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        programs: Programs,
        shapes: Sequence[Shape],
        scores: Shape,
        deliver: Deliver,
        *,
        chunk: int,
        draft: Draft | None = None,
    ) -> None:
        """No step is launched yet.

        Args:
          scheduler: knows the requests.
          programs: has a program for each of `shapes`.
          shapes: of steps; those of one token a sequence may be padded to several.
          scores: the shape that says how likely the tokens of a prompt are.
          deliver: called with the new tokens of a request.
          chunk: tokens of prompts that are read between two decoding steps.
          draft: guesses for requests that lookup finds nothing for.
        """
        self._scheduler, self._programs, self._deliver = scheduler, programs, deliver
        self._draft, self._chunk = draft, chunk
        self._reads = sorted((s for s in shapes if s.B == 1 and not s.every), key=lambda s: s.T)
        decodes = sorted(s for s in shapes if not s.every and s.T < READ_TOKENS)
        # An engine of one stream may have no shape for decoding but that which reads prompts.
        self._decodes = decodes or self._reads
        self._verifies = sorted(s for s in shapes if s.every)
        self._scores = scores
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
            unread = stream.length - stream.computed
            scores = bool(stream.unscored) and unread > 1
            shape = self._scores if scores else self._shape_to_read(unread, budget)
            # The last token is read by the step that makes the next one.
            tokens = min(unread - 1 if scores else unread, shape.T)
            if not self._provide(stream, stream.computed + tokens):
                continue
            if scores:
                self._score(stream, tokens)
            else:
                self._read(stream, tokens, shape)
            budget -= tokens
            launched = True
        return launched

    def _shape_to_read(self, unread: int, budget: int) -> Shape:
        """The shape of the next step of a prompt: a wide one, if it is nearly full."""
        widest = self._reads[-1]
        if READ_TOKENS < widest.T <= budget and unread > widest.T - READ_TOKENS:
            return widest
        return next(s for s in self._reads if s.T >= min(unread, READ_TOKENS))

    def _begin(self, stream: Stream) -> None:
        if stream.unscored:
            stream.scores.clear()  # it was retracted before all were known
        cached = self._scheduler.find_prefix(stream)
        if not stream.is_counted:
            stream.is_counted = True
            stream.generation.usage.cached_tokens = cached
            self.totals["cached_tokens"] += cached
            self.totals["prompt_tokens"] += stream.prompt_tokens
        if _is_penalized(stream):
            assert stream.slot is not None
            prompt, text = np.split(stream.tokens, [stream.prompt_tokens])
            counts = count_prompt(self._programs.vocab, prompt, text)
            self._programs.set_counts(stream.slot, counts)

    def _read(self, stream: Stream, tokens: int, shape: Shape) -> None:
        begin, end = stream.computed, stream.computed + tokens
        ends = end == stream.length
        batch = empty_batch(shape, self._programs.sizes)
        batch.chooses[...] = ends
        place(batch, 0, stream, stream.text[begin:end], begin)
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

    def _score(self, stream: Stream, tokens: int) -> None:
        """Reads part of a prompt, and says how likely the token after each was."""
        begin, end = stream.computed, stream.computed + tokens
        batch = empty_batch(self._scores, self._programs.sizes)
        place(batch, 0, stream, stream.text[begin:end], begin)
        rows = empty_rows(self._scores.rows, self._programs.vocab)
        rows.forced[:tokens] = stream.text[begin + 1 : end + 1]
        rows.logprobs[...] = True
        chosen = self._programs.run(self._scores, batch, rows)
        self.totals["steps"] += 1
        stream.computed = end
        self._steps.append(
            _Launched(shape=self._scores, streams=[stream], chosen=chosen, scored=tokens)
        )
        self._scheduler.keep_pages(stream)

    def _decode(self) -> bool:
        decoding = [s for s in self._scheduler.running if not s.reads]
        guessing = len(decoding) <= MOST_GUESSING and bool(self._verifies)
        ready = []
        for stream in decoding:
            waits = stream.params.matcher is not None or guessing
            if stream.room > 0 and not (waits and stream.in_flight):
                ready.append(stream)
        ready = [s for s in ready if self._provide(s, s.computed + 1)]
        ready = [s for s in ready if s.slot is not None and not s.reads]  # none that was retracted
        if not ready:
            return False
        guesses = self._guess(ready) if guessing else []
        if any(guess.tokens for guess in guesses):
            self._verify(ready, guesses)
        else:
            most = self._decodes[-1].B
            for begin in range(0, len(ready), most):
                self._decode_together(ready[begin : begin + most])
        return True

    def _decode_together(self, streams: list[Stream]) -> None:
        shape = next(s for s in self._decodes if len(streams) <= s.B)
        batch = empty_batch(shape, self._programs.sizes)
        for b, stream in enumerate(streams):
            known = stream.text[stream.length - 1] if not stream.in_flight else -1
            place(batch, b, stream, [known], stream.computed)
        listed = [(b, stream, stream.computed + 1) for b, stream in enumerate(streams)]
        rows, extras = self._rows_of(shape, listed)
        chosen = self._programs.run(shape, batch, rows, extras)
        for stream in streams:
            stream.computed += 1
            stream.in_flight += 1
        self._steps.append(_Launched(shape=shape, streams=streams, chosen=chosen))
        self.totals["steps"] += 1

    def _guess(self, streams: list[Stream]) -> list[Guess]:
        """The tokens of each request that may come next; none where it cannot be said."""
        guesses = [Guess([])] * len(streams)
        drafting: dict[int, int] = {}  # tokens to guess for a request, by its place
        for i, stream in enumerate(streams):
            if stream.lookup is not None:
                guesses[i] = stream.lookup.guess(min(GUESSES, stream.room - 1))
            if not guesses[i].tokens and self._draft is not None:
                most = min(DRAFTED, stream.room - 1)
                if self._scheduler.provide(stream, stream.computed + 1 + most):
                    drafting[i] = most
        if drafting and self._draft is not None:
            drafted = self._draft.guess([streams[i] for i in drafting], list(drafting.values()))
            for i, tokens in zip(drafting, drafted, strict=True):
                guesses[i] = Guess(tokens, is_drafted=True)
        return [self._cut(*pair) for pair in zip(streams, guesses, strict=True)]

    def _cut(self, stream: Stream, guess: Guess) -> Guess:
        """The part of a guess that the request's grammar takes, and that there are pages for."""
        if stream.params.matcher is not None:
            guess = guess._replace(tokens=_allowed(stream.params.matcher, guess.tokens))
        if not self._scheduler.provide(stream, stream.computed + 1 + len(guess.tokens)):
            return Guess([])  # no page: not worth taking one from another request
        return guess

    def _verify(self, streams: list[Stream], guesses: list[Guess]) -> None:
        shape = next(s for s in self._verifies if len(streams) <= s.B)
        batch = empty_batch(shape, self._programs.sizes)
        listed = []
        for b, (stream, guess) in enumerate(zip(streams, guesses, strict=True)):
            tokens = [stream.text[stream.length - 1], *guess.tokens]
            place(batch, b, stream, tokens, stream.computed)
            listed += [
                (b * shape.T + t, stream, stream.computed + 1 + t) for t in range(len(tokens))
            ]
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

    def _rows_of(
        self,
        shape: Shape,
        listed: Sequence[tuple[int, Stream, int]],
        guesses: dict[Stream, Guess] | None = None,
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
            set_row(rows, row, stream, position, self._programs.vocab)
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
                guess = (guesses or {}).get(stream, Guess([]))
                try:
                    _fill_masks(stream.params.matcher, extras.mask, own, guess.tokens)
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
                if step.scored:
                    self._take_scores(stream, chosen, step.scored)
                    continue
                stream.in_flight -= 1
                if step.guesses is None:
                    self._take(stream, chosen, [i])
                    continue
                self._take_verified(stream, chosen, i * step.shape.T, step.guesses[i])

    def _take_scores(self, stream: Stream, chosen: Chosen, scored: int) -> None:
        stream.scores += _logprobs(chosen, range(scored), stream.params.prompt_logprobs)
        if not stream.unscored:
            self._deliver(stream, Delta(prompt_logprobs=tuple(stream.scores)))

    def _take_verified(self, stream: Stream, chosen: Chosen, first: int, guess: Guess) -> None:
        guessed, right = len(guess.tokens), 0
        while right < guessed and chosen.tokens[first + right] == guess.tokens[right]:
            right += 1
        stream.computed += 1 + right
        usage = stream.generation.usage
        self.totals["guessed_tokens"] += guessed
        self.totals["accepted_tokens"] += right
        if guess.is_predicted:
            usage.accepted_tokens += right
            usage.rejected_tokens += guessed - right
        if guess.is_drafted:
            if self._draft is not None and guessed:
                self._draft.judge(stream, guessed, right)
        elif stream.lookup is not None:
            stream.lookup.judge(guessed, right)
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
