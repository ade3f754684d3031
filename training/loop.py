"""The loop of a run: step after step to the last one or a signal; then save and sample."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from models.checkpoints.saving import save
from models.generation import generate
from sharding.state import logical, logical_shapes
from training.checkpoint import Checkpoints
from training.config import choices_of_losses
from training.console import Console
from training.data import Corpus, Pair, evaluation_batches, training_batch
from training.metrics import MetricsLog, loss_curve, read_metrics
from training.optimizer import learning_rate_schedule
from training.programs import Programs
from training.run_folder import CONFIG, LOSS_CURVE, MODEL, SAMPLE, RunFolderGone, RunFolderLock
from training.signals import StopSignals
from training.step import Metrics, TrainState
from wsekern.atomic_write import atomic_write
from wsekern.error_line import error_line

# The most steps dispatched and not yet waited for: jax 0.10 hangs on emulated devices at about a
# hundred, and 16 cost no speed. A signal waits for them, so they are no more than a second's work,
# or two steps.
_IN_FLIGHT = 16
_SECONDS_BETWEEN_CHECKS = 1.0


class Diverged(RuntimeError):
    """The loss, its gradient or the state is not finite; the last good checkpoint is untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outcome of a run."""

    step: int
    loss: float  # of the last step, nats a token; NaN if no step was taken
    val_loss: float | None  # of the last evaluation, nats a token
    run_dir: pathlib.Path
    stopped: bool  # by a signal, before the last step
    saved: bool  # the run can be resumed from its last step; a finished one has left its model
    resumes_from: int | None  # the newest step that is saved undamaged; None: there is none
    sample: str | None


class TrainingLoop:
    """The state of a run from step to step; `run` trains to the end."""

    def __init__(
        self,
        programs: Programs,
        corpus: Corpus,
        prompt: Int[np.ndarray, " T"],
        checkpoints: Checkpoints,
        console: Console,
        signals: StopSignals,
        lock: RunFolderLock,
        peak_flops: float,
        tokenizer_from: pathlib.Path | None = None,
    ) -> None:
        """Makes the first state, or when resuming restores the newest good checkpoint.

        Args:
          programs: the compiled programs.
          corpus: the data.
          prompt: the tokens that the sample at the end continues.
          checkpoints: the run folder's.
          console: where to report; entered.
          signals: what can stop the run; entered.
          lock: the run folder's; held.
          peak_flops: the peak of all devices together, FLOP/s.
          tokenizer_from: checkpoint whose tokenizer is saved with the trained model.

        Raises:
          ValueError: when resuming, no checkpoint can be used, or its data differs.
        """
        self.programs = programs
        self.plan = programs.plan
        self.config = programs.plan.config
        self.corpus = corpus
        self.prompt = prompt
        self.checkpoints = checkpoints
        self.console = console
        self.signals = signals
        self.lock = lock
        self.tokenizer_from = tokenizer_from
        flops = self.plan.sizes.flops_per_token(self.plan.context)
        self.peak_tokens_per_s = peak_flops / flops
        self.rate = jax.jit(learning_rate_schedule(self.config))
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self.most_pending = 2
        with console.waiting("restoring the state" if self.config.resume else "making the state"):
            self.step, self.state, seconds = self._first_or_saved_state()
        self.log = MetricsLog(self.config.run_dir, resume_from=self.step)
        self.loss = self.tokens_per_s = math.nan
        evaluated = [line for line in read_metrics(self.config.run_dir) if "val_loss" in line]
        self.evaluated_step = evaluated[-1]["step"] if evaluated else 0
        self.val_loss: float | None = evaluated[-1]["val_loss"] if evaluated else None
        self.saved_step = self.checked_step = self.step
        self.saved_at = self.checked_at = time.monotonic()
        self.began = self.checked_at - seconds  # without the pauses before resuming

    def run(self) -> RunResult:
        """Takes the steps that are left, or stops at a signal; then saves, evaluates and samples.

        Raises:
          Diverged: the loss, its gradient or the state became infinite or NaN.
          RunFolderGone: the run folder was removed or renamed.
        """
        try:
            # A step is only dispatched here. `_check_losses` waits for it later, so that the next
            # batch is drawn while the devices compute.
            while self.step < self.config.steps and not self.signals.received:
                self._take_step()
            self._save()  # before evaluating and sampling, which may take long
        except Diverged:
            self.console.end()
            self._draw_loss_curve()
            raise
        except RunFolderGone:
            self.console.end()
            raise
        except Exception:
            with contextlib.suppress(Exception):  # raise the first error, not this one
                self._save_last()
            raise
        done = self.step == self.config.steps
        if done and self.evaluated_step != self.step:
            self._evaluate()
        self.console.end()
        saved, sample = self._save_last(), None
        if done and not self.signals.received:
            saved &= self._export()
        # Who sends SIGTERM waits for a few seconds only, which importing matplotlib alone may take.
        if self.signals.received in (None, signal.SIGINT):
            self._draw_loss_curve()
        if done and not self.signals.received:
            sample = self._sample()  # last: everything else is saved, so a signal may end it
        self.lock.check()
        self.console.note(f"run folder: {self.config.run_dir}")
        if self.signals.received:
            go_on = "; go on with --resume" if saved else ""
            name = self.signals.received.name
            self.console.note(f"stopped by {name} after step {self.step}{go_on}")
        return RunResult(
            step=self.step,
            loss=self.loss,
            val_loss=self.val_loss,
            run_dir=self.config.run_dir,
            stopped=self.signals.received is not None,
            saved=saved,
            resumes_from=self.step if self._is_saved() else self.checkpoints.last_good(),
            sample=sample,
        )

    def _first_or_saved_state(self) -> tuple[int, TrainState, float]:
        if not self.config.resume:
            return 0, self.programs.first_state(), 0.0
        if self.checkpoints.empty():
            self.console.note("no step was saved yet: starting with the first")
            return 0, self.programs.first_state(), 0.0
        shapes = self.plan.shapes
        step, state, extra = self.checkpoints.restore(shapes, logical_shapes=logical_shapes(shapes))
        for line in self.checkpoints.skipped:
            self.console.note(f"checkpoint passed over: {line}")
        # The data may have moved, but other text would change the losses.
        if extra["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"data: the text differs from that of the run in {self.config.run_dir}; give the "
                "same --data, or start a new run with another --out"
            )
        # config.json lies open to editors and to damage; the checkpoint is sure of its numbers.
        now = choices_of_losses(self.config)
        changed = [
            f"{name}={now[name]!r} (the checkpoint was made with {value!r})"
            for name, value in extra.get("choices", {}).items()
            if name in now and now[name] != value
        ]
        if changed:
            raise ValueError(
                f"{self.config.run_dir / CONFIG} has been changed: {'; '.join(changed)}; set it "
                "back, or start a new run with another --out"
            )
        self.console.note(f"resumed from step {step}")
        return step, state, extra["seconds"]

    def _take_step(self) -> None:
        config = self.config
        inputs, targets = map(self.programs.put, self._batch())
        self.state, metrics = self.programs.step(self.state, inputs, targets)
        self.step += 1
        self.pending.append((self.step, metrics))
        logged = self.step in (1, config.steps) or self.step % config.log_every == 0
        evaluated = _due(self.step, config.eval_every) and self.step < config.steps
        waited = time.monotonic() - self.checked_at > _SECONDS_BETWEEN_CHECKS
        if logged or evaluated or waited or len(self.pending) >= self.most_pending:
            self._check_losses()
        minutes = (time.monotonic() - self.saved_at) / 60
        by_clock = config.checkpoint_minutes and minutes >= config.checkpoint_minutes
        if by_clock or _due(self.step, config.checkpoint_every):
            self._save()
        if evaluated:
            self._evaluate()
        elif logged and self.step < config.steps:
            self._write_metrics()

    def _check_losses(self) -> None:
        """Waits for the steps in flight, checks that their losses are finite; shows progress."""
        self.lock.check()
        while self.pending:
            step, metrics = self.pending.popleft()
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._write_metrics(step=step, loss=loss)
                raise self._divergence(
                    f"at step {step} the loss is {loss} and its gradient's norm {norm}"
                )
            self.loss = loss
        steps, seconds = self.step - self.checked_step, time.monotonic() - self.checked_at
        if steps:
            self.tokens_per_s = steps * self.plan.tokens_per_step / seconds
            self.most_pending = max(2, min(_IN_FLIGHT, int(steps / seconds)))
            left = (self.config.steps - self.step) * self.plan.tokens_per_step
            self.console.progress(
                step=self.step,
                loss=self.loss,
                learning_rate=float(self.rate(self.step - 1)),
                tokens_per_s=self.tokens_per_s,
                share_of_peak=self.tokens_per_s / self.peak_tokens_per_s,
                seconds_left=left / self.tokens_per_s,
            )
        self.checked_step, self.checked_at = self.step, time.monotonic()

    def _divergence(self, what: str) -> Diverged:
        self._report(self.checkpoints.wait())
        saved = self.checkpoints.steps()
        good = f"step {saved[-1]} is the last good checkpoint" if saved else "no checkpoint was due"
        return Diverged(
            f"{what}; {good}; start a new run, in another --out, with a lower --learning-rate (now "
            f"{self.config.learning_rate}) or a longer --warmup"
        )

    def _check_state(self) -> None:
        """Raises Diverged unless the state is finite, and so is its loss on the next batch.

        A step's loss is that of the parameters before its update. So it says nothing about what
        the update has made of them, which is what a checkpoint saves.
        """
        inputs, targets = map(self.programs.put, self._batch())
        loss = float(self.programs.evaluate(self.state["params"], inputs, targets))
        if not math.isfinite(loss):
            raise self._divergence(f"after the update of step {self.step} the loss is {loss}")
        if not self.programs.is_finite(self.state):
            raise self._divergence(f"after the update of step {self.step} the state is not finite")

    def _batch(self) -> Pair:
        """The batch of the next step."""
        return training_batch(
            self.corpus.train,
            seed=self.config.seed,
            step=self.step,
            batch=self.config.batch,
            context=self.plan.context,
        )

    def _evaluate(self) -> None:
        """Measures the loss on the validation data, unless a signal comes; writes the metrics."""
        batches = evaluation_batches(
            self.corpus.validation,
            batch=self.config.batch,
            context=self.plan.context,
            batches=self.config.eval_batches,
        )
        losses = []
        for pair in batches:
            if self.signals.received:
                return self._write_metrics()
            inputs, targets = map(self.programs.put, pair)
            losses.append(float(self.programs.evaluate(self.state["params"], inputs, targets)))
        self.val_loss = float(np.mean(losses))
        self.evaluated_step = self.step
        self.checked_at = time.monotonic()  # tokens_per_s leaves evaluations out
        self.console.evaluation(self.step, self.val_loss)
        return self._write_metrics(val_loss=self.val_loss)

    def _write_metrics(
        self, *, step: int | None = None, loss: float | None = None, **others: float
    ) -> None:
        step = self.step if step is None else step
        with self._report_errors("a line of metrics.jsonl"):
            self.log.write(
                step,
                loss=self.loss if loss is None else loss,
                tokens_per_s=self.tokens_per_s,
                seconds=time.monotonic() - self.began,
                learning_rate=float(self.rate(step - 1)),
                **others,
            )

    def _save(self) -> None:
        self._check_losses()
        if self.step == self.saved_step:
            return
        self._check_state()  # never save one that has diverged
        extra = {
            "corpus": self.corpus.fingerprint,
            "seconds": time.monotonic() - self.began,
            "choices": choices_of_losses(self.config),
        }
        shapes = logical_shapes(self.state)
        self._report(self.checkpoints.save(self.step, self.state, extra, logical_shapes=shapes))
        self.saved_step = self.step
        self.saved_at = self.checked_at = time.monotonic()  # tokens_per_s leaves saves out

    def _save_last(self) -> bool:
        """Saves the last step; returns whether the run can be resumed from it."""
        self._save()
        self._report(self.checkpoints.wait())
        return self.step == 0 or self._is_saved()

    def _is_saved(self) -> bool:
        return self.step in self.checkpoints.steps()[-1:]

    def _report(self, troubles: list[str]) -> None:
        for line in troubles:
            self.console.note(f"checkpoint: {line}")

    def _sample(self) -> str | None:
        if not self.config.sample_tokens:
            return None
        doing = f"sampling {self.config.sample_tokens} tokens"
        with (
            self.signals.end_at_once("sampling", lambda: bool(self.checkpoints.steps())),
            self.console.busy(doing),
            self.plan.wafer,
        ):
            model = nnx.merge(self.plan.graph, logical(self.state["params"]))
            text = generate(
                model,
                jnp.asarray(self.prompt[None]),
                max_new_tokens=self.config.sample_tokens,
                temperature=self.config.temperature,
                key=jax.random.key(self.config.seed),
            )
            sample = self.corpus.decode(np.asarray(text)[0])
        self.console.sample(sample)
        with self._report_errors("the sample"):
            with atomic_write(self.config.run_dir / SAMPLE) as file:
                file.write(sample.encode())
        return sample

    def _export(self) -> bool:
        """Writes the model as a Hugging Face folder, with its tokenizer; returns whether it did."""
        folder = self.config.run_dir / MODEL
        with self._report_errors("the model"), self.console.waiting("writing the model"):
            folder.mkdir(exist_ok=True)
            self.corpus.save_tokenizer(folder, self.tokenizer_from)
            save(nnx.merge(self.plan.graph, self.state["params"]), folder)
            self.console.note(f"model: {folder}")
            return True
        return False

    def _draw_loss_curve(self) -> None:
        with self._report_errors("the loss curve"):
            picture = self.config.run_dir / LOSS_CURVE
            self.console.note(loss_curve(read_metrics(self.config.run_dir), picture))

    @contextlib.contextmanager
    def _report_errors(self, name: str) -> Iterator[None]:
        """Reports an OSError, such as a full disk, and goes on: it is no reason to end a run."""
        try:
            yield
        except OSError as error:
            self.console.note(f"{name} was not written: {error_line(error)}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
