"""This file is a training run from its configuration to its loss curve, stoppable at every step."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig
from models.generate import generate
from models.presets import find_preset
from sharding.state import logical, logical_shapes
from training import config as configuration
from training.checkpoint import Checkpoints
from training.config import TrainingConfig
from training.console import Console
from training.data import Corpus, batch, evaluation_batches, open_corpus
from training.header import find_peak, header
from training.launch import make_wafer, prepare
from training.metrics import MetricsLog, loss_curve, read_metrics
from training.optimiser import schedule
from training.programs import Programs, compile_programs, make_plan
from training.signals import StopSignals
from training.step import Metrics, TrainState

# Steps in flight: jax 0.10 hangs on emulated devices at about a hundred; 16 cost no speed.
_IN_FLIGHT = 16
_SECONDS_BETWEEN_LOOKS = 1.0


class Diverged(RuntimeError):
    """The loss or its gradient is no longer a number; the last good checkpoint is untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run ended with."""

    step: int
    loss: float  # of the last step, nats a token; NaN if none was taken
    val_loss: float | None  # of the last evaluation
    run_dir: pathlib.Path
    stopped: bool  # by a signal, before its last step
    saved: bool  # whether the last step can be resumed from
    sample: str | None


def model_sizes(config: TrainingConfig, corpus: Corpus) -> DecoderConfig:
    """The preset's sizes, with the vocabulary and the context of this run.

    Raises:
      ValueError: the preset is unknown or its vocabulary too small, or the context is longer than
        the preset's.
    """
    sizes = find_preset(config.preset)
    context = config.context or sizes.context
    if context > sizes.context:
        raise ValueError(
            f"context={context} is longer than that of preset {config.preset!r}, {sizes.context}; "
            "shorten it or choose a larger preset"
        )
    if config.tokens == "characters":
        return dataclasses.replace(sizes, vocab=corpus.vocab)
    if corpus.vocab > sizes.vocab:
        raise ValueError(
            f"the data has {corpus.vocab} different tokens, preset {config.preset!r} knows "
            f"{sizes.vocab}; choose a larger preset"
        )
    return sizes


class Trainer:
    """One run: `Trainer(config).fit()`."""

    def __init__(self, config: TrainingConfig):
        """Checks all that can be checked before any work is done, and makes the devices.

        Args:
          config: every choice of the run.

        Raises:
          ValueError: what the configuration asks for cannot be had; the message names the field.
          OSError: the data cannot be read or the run folder not written.
          RuntimeError: jax has already started with fewer CPU devices than PEs.
        """
        context = config.context or find_preset(config.preset).context
        prepare(config)
        wafer = make_wafer(config)
        self.config = config
        self.corpus = open_corpus(
            config.data or None,
            tokens=config.tokens,
            context=context,
            validation_fraction=config.validation_fraction,
        )
        self.prompt = self.corpus.encode(config.prompt)
        self.plan = make_plan(config, model_sizes(config, self.corpus), wafer)
        self.checkpoints = Checkpoints(config.run_dir / "checkpoints", keep=config.keep)
        self._check_run_dir()

    def _check_run_dir(self) -> None:
        saved = self.config.run_dir / configuration.FILE_NAME
        if self.config.resume:
            if not saved.is_file():
                raise ValueError(
                    f"resume: {self.config.run_dir} holds no run ({saved.name} is not there); give "
                    "its folder with --out, or leave --resume out to start anew"
                )
            configuration.check_resume(configuration.load(saved), self.config)
        elif self.checkpoints.steps():
            raise ValueError(
                f"out: {self.config.run_dir} holds a run already, of which step "
                f"{self.checkpoints.steps()[-1]} is saved; go on with --resume, or choose another "
                "--out"
            )
        self.checkpoints.check_writable(self.plan.shapes)

    def fit(self) -> Result:
        """Trains to the last step, or until a signal; saves, evaluates, draws and samples.

        Raises:
          Diverged: the loss or its gradient became infinite or NaN.
          ValueError: (on resuming) no checkpoint is sound, or it belongs to another run.
        """
        with StopSignals() as signals, Console(self.config) as console, self.checkpoints:
            peak = find_peak(self.plan.wafer, self.config.dtype)
            console.show(header(self.plan, self.corpus, peak))
            if skipped := self.corpus.skipped:
                console.note(f"files without text passed over: {len(skipped)}; first: {skipped[0]}")
            with console.compiling():
                programs = compile_programs(self.plan)
            if programs.temporary_bytes is not None:
                console.note(f"a step has {programs.temporary_bytes / 1e6:,.1f} MB of temporaries")
            configuration.save(self.config, self.config.run_dir / configuration.FILE_NAME)
            return _Run(self, programs, console, signals, peak.flops).to_the_end()


class _Run:
    """The loop, and what it has to remember from step to step."""

    def __init__(
        self,
        trainer: Trainer,
        programs: Programs,
        console: Console,
        signals: StopSignals,
        peak_flops: float,
    ):
        self.config = trainer.config
        self.corpus = trainer.corpus
        self.prompt = trainer.prompt
        self.checkpoints = trainer.checkpoints
        self.plan = trainer.plan
        self.programs = programs
        self.console = console
        self.signals = signals
        flops = self.plan.sizes.flops_per_token(self.plan.context)
        self.peak_tokens_per_s = peak_flops / flops
        self.rates = np.asarray(jax.vmap(schedule(self.config))(np.arange(self.config.steps)))
        self.pending: collections.deque[tuple[int, Metrics]] = collections.deque()
        self.step, self.state, seconds = self._start()
        self.log = MetricsLog(self.config.run_dir, resume_from=self.step)
        self.loss = self.tokens_per_s = math.nan
        self.val_loss: float | None = None
        self.saved_step = self.looked_step = self.step
        self.saved_at = self.looked_at = time.monotonic()
        self.began = self.looked_at - seconds

    def to_the_end(self) -> Result:
        while self.step < self.config.steps and not self.signals.received:
            self._one_step()
        self._look()
        self.console.end()
        saved = self._save_last()
        stopped = self.step < self.config.steps
        sample = None if stopped else self._sample()
        with self._reported("the loss curve"):
            picture = self.config.run_dir / "loss.png"
            self.console.note(loss_curve(read_metrics(self.config.run_dir), picture))
        self.console.note(f"run folder: {self.config.run_dir}")
        if stopped and self.signals.received:
            name = self.signals.received.name
            self.console.note(f"stopped by {name} after step {self.step}; go on with --resume")
        return Result(
            step=self.step,
            loss=self.loss,
            val_loss=self.val_loss,
            run_dir=self.config.run_dir,
            stopped=stopped,
            saved=saved,
            sample=sample,
        )

    def _start(self) -> tuple[int, TrainState, float]:
        if not self.config.resume:
            return 0, self.programs.first_state(), 0.0
        shapes = self.plan.shapes
        step, state, extra = self.checkpoints.restore(shapes, logical_shapes=logical_shapes(shapes))
        for line in self.checkpoints.skipped:
            self.console.note(f"checkpoint passed over: {line}")
        if extra["corpus"] != self.corpus.fingerprint:
            raise ValueError(
                f"data: the text differs from that of the run in {self.config.run_dir}; give the "
                "same --data, or start a new run with another --out"
            )
        self.console.note(f"resumed from step {step}")
        return step, state, extra["seconds"]

    def _one_step(self) -> None:
        config = self.config
        pair = batch(
            self.corpus.train,
            seed=config.seed,
            step=self.step,
            batch=config.batch,
            context=self.plan.context,
        )
        self.state, metrics = self.programs.step(self.state, *map(self.programs.put, pair))
        self.step += 1
        self.pending.append((self.step, metrics))
        last = self.step == config.steps
        logged = last or self.step == 1 or self.step % config.log_every == 0
        evaluated = last or _due(self.step, config.eval_every)
        waited = time.monotonic() - self.looked_at > _SECONDS_BETWEEN_LOOKS
        if logged or evaluated or waited or len(self.pending) == _IN_FLIGHT:
            self._look()
        if evaluated:
            self.val_loss = self._evaluate()
        if logged or evaluated:
            self._write_metrics(val_loss=self.val_loss if evaluated else None)
        minutes = (time.monotonic() - self.saved_at) / 60
        by_clock = config.checkpoint_minutes and minutes >= config.checkpoint_minutes
        if not last and (by_clock or _due(self.step, config.checkpoint_every)):
            self._save()

    def _look(self) -> None:
        """Waits for the steps in flight, checks their losses, and tells the console."""
        while self.pending:
            step, metrics = self.pending.popleft()
            loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(self._diverged(step, loss, norm))
            self.loss = loss
        steps, seconds = self.step - self.looked_step, time.monotonic() - self.looked_at
        if steps:
            self.tokens_per_s = steps * self.plan.tokens_per_step / seconds
            left = (self.config.steps - self.step) * self.plan.tokens_per_step
            self.console.progress(
                step=self.step,
                loss=self.loss,
                learning_rate=float(self.rates[self.step - 1]),
                tokens_per_s=self.tokens_per_s,
                share_of_peak=self.tokens_per_s / self.peak_tokens_per_s,
                seconds_left=left / self.tokens_per_s,
            )
        self.looked_step, self.looked_at = self.step, time.monotonic()

    def _diverged(self, step: int, loss: float, norm: float) -> str:
        kept = self.checkpoints.steps()
        good = f"step {kept[-1]} is the last good checkpoint" if kept else "no checkpoint was due"
        return (
            f"at step {step} the loss is {loss} and its gradient's norm {norm}; {good}; lower "
            f"--learning-rate (now {self.config.learning_rate}) or raise --warmup"
        )

    def _evaluate(self) -> float:
        batches = evaluation_batches(
            self.corpus.validation,
            batch=self.config.batch,
            context=self.plan.context,
            batches=self.config.eval_batches,
        )
        losses = [
            float(self.programs.evaluate(self.state["params"], *map(self.programs.put, pair)))
            for pair in batches
        ]
        self.looked_at = time.monotonic()
        mean = float(np.mean(losses))
        self.console.evaluated(self.step, mean)
        return mean

    def _write_metrics(self, val_loss: float | None) -> None:
        with self._reported("a line of metrics.jsonl"):
            self.log.write(
                self.step,
                loss=self.loss,
                tokens_per_s=self.tokens_per_s,
                seconds=time.monotonic() - self.began,
                learning_rate=float(self.rates[self.step - 1]),
                **({} if val_loss is None else {"val_loss": val_loss}),
            )

    def _save(self) -> None:
        self._look()  # a state whose losses have not been looked at may be no good
        extra = {"corpus": self.corpus.fingerprint, "seconds": time.monotonic() - self.began}
        shapes = logical_shapes(self.state)
        self._tell(self.checkpoints.save(self.step, self.state, extra, logical_shapes=shapes))
        self.saved_step = self.step
        self.saved_at = self.looked_at = time.monotonic()

    def _save_last(self) -> bool:
        """Whether the run can be resumed from its last step."""
        if self.step > self.saved_step:
            self._save()
        self._tell(self.checkpoints.wait())
        return self.step in (0, *self.checkpoints.steps()[-1:])

    def _tell(self, troubles: list[str]) -> None:
        for line in troubles:
            self.console.note(f"checkpoint: {line}")

    def _sample(self) -> str | None:
        if not self.config.sample_tokens:
            return None
        with self.plan.wafer:
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
        with self._reported("the sample"):
            (self.config.run_dir / "sample.txt").write_text(sample)
        return sample

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """A full disk is no reason to end a run: it is said, and the run goes on."""
        try:
            yield
        except OSError as error:
            self.console.note(f"{what} was not written: {error}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
