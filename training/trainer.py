"""A training run from its configuration to its end: `Trainer(config).fit()`.

Making a `Trainer` checks the whole configuration and makes the devices, the data and the plan.
`fit` then compiles the programs and runs the loop in `training.loop`.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
from jaxtyping import Int

from models.config import DecoderConfig
from models.text.tokenizer import Tokenizer
from training.checkpoint import Checkpoints
from training.config import (
    TrainingConfig,
    check_resume,
    load_config,
    resolve_config,
    save_config,
)
from training.console import Console
from training.data import Corpus, open_corpus
from training.header import find_peak, header
from training.initial_model import InitialModel, find_initial_model
from training.loop import RunResult, TrainingLoop
from training.metrics import read_metrics
from training.plan import RunPlan, make_plan
from training.programs import compile_programs
from training.run_folder import (
    CHECKPOINTS,
    CONFIG,
    SAMPLE,
    check_out,
    is_finished,
    lock_run_folder,
    remove_cut_writes,
)
from training.signals import StopSignals
from wsekern.wafer.launch import make_wafer, prepare_devices


class Trainer:
    """One run: `Trainer(config).fit()`."""

    def __init__(self, config: TrainingConfig) -> None:
        """Checks all that can be checked before any work is done, and makes the devices.

        Args:
          config: every choice of the run.

        Raises:
          ValueError: the configuration cannot be met; the message names the field.
          OSError: the data cannot be read, or the run folder cannot be written.
          RuntimeError: jax has already started with fewer CPU devices than PEs.
        """
        prepare_devices(config.devices, config.platform, needed_by=f"wafer={config.wafer!r}")
        self.config = config
        # A finished run needs neither its text nor the checkpoint that it started from, so they are
        # read only when they are asked for.
        known = config.context if config.resume else None
        self.config = config = resolve_config(config, known or self.start.context)
        self.wafer = make_wafer(config.wafer, config.platform, virtual=config.virtual)
        changed = self._check_run_folder(self.open_checkpoints())
        if not self._is_finished(changed):
            _ = self.prompt, self.plan  # what is wrong with them comes up before any work
            self.open_checkpoints().check_writable(self.plan.shapes)

    @functools.cached_property
    def start(self) -> InitialModel:
        """The model that the run starts from."""
        return find_initial_model(self.config)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The data; a finished run needs none."""
        config = self.config
        return open_corpus(
            config.data or None,
            tokens=_token_kind(config, self.start),
            context=config.context or self.start.context,
            validation_fraction=config.validation_fraction,
        )

    @functools.cached_property
    def prompt(self) -> Int[np.ndarray, " T"]:
        """The tokens that the run's sample goes on from."""
        return _prompt_tokens(self.config, self.corpus)

    @functools.cached_property
    def plan(self) -> RunPlan:
        """The shapes, layouts and functions of the run."""
        wafer, read = self.wafer, self.start.read_params
        sizes = model_sizes(self.config, self.corpus, self.start.sizes)
        return make_plan(self.config, sizes, wafer, None if read is None else lambda: read(wafer))

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of this run; close them, or use them in a `with`."""
        return Checkpoints(self.config.run_dir / CHECKPOINTS, keep=self.config.keep)

    def _check_run_folder(self, checkpoints: Checkpoints) -> list[str]:
        """Refuses a folder that this run cannot use; a line for each choice that resuming changes.

        `fit` checks again, under the lock: another process may have trained there since.
        """
        check_out(self.config.run_dir)
        changes: list[str] = []
        saved = self.config.run_dir / CONFIG
        if self.config.resume:
            if not saved.is_file():
                raise ValueError(
                    f"resume: {self.config.run_dir} holds no run ({saved.name} is not there); give "
                    "its folder with --out, or leave --resume out to start anew"
                )
            changes = check_resume(load_config(saved), self.config)
        elif saved.is_file() and not checkpoints.steps():
            try:
                load_config(saved)  # of a run that was stopped before it saved
            except ValueError as error:
                raise ValueError(
                    f"out: {saved} would be overwritten, and no run wrote it ({error}); choose "
                    "another --out"
                ) from None
        elif checkpoints.steps():
            raise ValueError(
                f"out: {self.config.run_dir} holds a run already, saved at step "
                f"{checkpoints.steps()[-1]}; go on with --resume, or choose another --out"
            )
        if self.config.steps < (checkpoints.steps() or [0])[-1]:
            raise ValueError(
                f"steps={self.config.steps}: the run in {self.config.run_dir} is at step "
                f"{checkpoints.steps()[-1]} already; ask for more, or leave --steps out"
            )
        return changes

    def fit(self) -> RunResult:
        """Trains to the last step or until a signal; saves, evaluates, draws and samples.

        Raises:
          Diverged: the loss, its gradient or the state became infinite or NaN.
          RunFolderGone: the run folder was removed or renamed.
          ValueError: the run folder is in use or holds another run; on resuming, no checkpoint can
            be used.
        """
        with (
            StopSignals() as signals,
            Console(self.config) as console,
            lock_run_folder(self.config.run_dir) as lock,
            self.open_checkpoints() as checkpoints,
        ):
            changed = self._check_run_folder(checkpoints)
            for line in [*checkpoints.clean(), *remove_cut_writes(self.config.run_dir)]:
                console.note(line)
            if self._is_finished(changed):
                return self._result_of_finished(console)
            checkpoints.check_writable(self.plan.shapes)
            with signals.end_at_once("compiling", lambda: bool(checkpoints.steps())):
                peak = find_peak(self.plan.wafer, self.config.dtype)
                console.show(header(self.plan, self.corpus, peak))
                if skipped := self.corpus.skipped:
                    console.note(
                        f"files without text passed over: {len(skipped)}; first: {skipped[0]}"
                    )
                with console.compiling():
                    programs = compile_programs(self.plan)
                if programs.temporary_bytes is not None:
                    temporaries = f"{programs.temporary_bytes / 1e6:,.1f} MB of temporaries"
                    console.note(f"a step has {temporaries}")
                loop = TrainingLoop(
                    programs,
                    self.corpus,
                    self.prompt,
                    checkpoints,
                    console,
                    signals,
                    lock,
                    peak.flops,
                    tokenizer_from=self.start.path,
                )
            for line in changed:
                console.note(f"changed: {line}")
            save_config(self.config, self.config.run_dir / CONFIG)
            return loop.run()

    def _is_finished(self, changed: list[str]) -> bool:
        """Whether nothing is left to do; another sample than the one written would be."""
        config = self.config
        sampling = ("sample_tokens", "prompt", "temperature")
        return (
            config.resume
            and is_finished(config.run_dir, config.steps, sample=config.sample_tokens > 0)
            and not any(line.partition(":")[0] in sampling for line in changed)
        )

    def _result_of_finished(self, console: Console) -> RunResult:
        """What a run that has nothing left to do has come to; says so."""
        config = self.config
        lines = read_metrics(config.run_dir)
        evaluated = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
        losses = [line["loss"] for line in lines if line.get("loss") is not None]
        sample = config.run_dir / SAMPLE
        found = f", validation loss {evaluated[-1]:.4f}" if evaluated else ""
        console.note(
            f"the run in {config.run_dir} is finished, at step {config.steps} of {config.steps}"
            f"{found}; for more steps, give a larger --steps"
        )
        return RunResult(
            step=config.steps,
            loss=losses[-1] if losses else math.nan,
            val_loss=evaluated[-1] if evaluated else None,
            run_dir=config.run_dir,
            stopped=False,
            saved=True,
            resumes_from=config.steps,
            sample=sample.read_text() if config.sample_tokens else None,
        )


def model_sizes(config: TrainingConfig, corpus: Corpus, sizes: DecoderConfig) -> DecoderConfig:
    """`sizes` with the vocabulary of this run.

    Raises:
      ValueError: the model's vocabulary is too small, or the context is longer than the model's.
    """
    context = config.context or sizes.context
    model = f"checkpoint {config.init!r}" if config.init else f"preset {config.preset!r}"
    if context > sizes.context:
        raise ValueError(
            f"context={context} is longer than that of {model}, {sizes.context}; "
            "shorten it or choose a larger model"
        )
    if config.tokens == "characters":
        return dataclasses.replace(sizes, vocab=corpus.vocab)
    if corpus.vocab > sizes.vocab:
        raise ValueError(
            f"the data has {corpus.vocab} different tokens, {model} knows "
            f"{sizes.vocab}; choose a larger model"
        )
    return sizes


def _token_kind(
    config: TrainingConfig, start: InitialModel
) -> Literal["bytes", "characters"] | Tokenizer:
    if start.tokenizer is not None and config.tokens == "checkpoint":
        return start.tokenizer
    return "characters" if config.tokens == "characters" else "bytes"


def _prompt_tokens(config: TrainingConfig, corpus: Corpus) -> Int[np.ndarray, " T"]:
    """The prompt's tokens; without a sample, or if the default prompt cannot be encoded, the data's
    first token.
    """
    if not config.sample_tokens:
        return corpus.train[:1].astype(np.int32)
    try:
        return corpus.encode(config.prompt)
    except ValueError as error:
        # The default is a line's end, which a vocabulary of characters may lack.
        if config.prompt == TrainingConfig.prompt:
            return corpus.train[:1].astype(np.int32)
        raise ValueError(f"prompt={config.prompt!r}: {error}") from None
