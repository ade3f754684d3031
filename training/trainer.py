"""This file is a training run from its configuration to its end.

`Trainer(config).fit()` is the whole of it.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from models.config import DecoderConfig
from models.text.tokenizer import Tokenizer
from training import config as configuration
from training.checkpoint import Checkpoints
from training.config import TrainingConfig
from training.console import Console
from training.data import Corpus, open_corpus
from training.header import find_peak, header
from training.lock import locked
from training.programs import compile_programs, make_plan
from training.run import Result, Run
from training.signals import StopSignals
from training.start import Start, find_start
from wsekern.wafer.launch import make_wafer, prepare_devices


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
        prepare_devices(config.devices, config.platform, needed_by=f"wafer={config.wafer!r}")
        start = find_start(config)
        wafer = make_wafer(config.wafer, config.platform, virtual=config.virtual)
        self.config = config = configuration.resolved(config, start.context)
        self.corpus = open_corpus(
            config.data or None,
            tokens=_tokens(config, start),
            context=config.context or start.context,
            validation_fraction=config.validation_fraction,
        )
        self.prompt = _prompt(config, self.corpus)
        sizes, read = model_sizes(config, self.corpus, start.sizes), start.read_params
        self.start = start
        self.plan = make_plan(config, sizes, wafer, None if read is None else lambda: read(wafer))
        self._check_run_dir(self.open_checkpoints())

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of this run; close them, or use them in a `with`."""
        return Checkpoints(self.config.run_dir / "checkpoints", keep=self.config.keep)

    def _check_run_dir(self, checkpoints: Checkpoints) -> list[str]:
        """What this run changes of the one that it resumes, a line a choice."""
        changes: list[str] = []
        saved = self.config.run_dir / configuration.FILE_NAME
        if self.config.resume:
            if not saved.is_file():
                raise ValueError(
                    f"resume: {self.config.run_dir} holds no run ({saved.name} is not there); give "
                    "its folder with --out, or leave --resume out to start anew"
                )
            changes = configuration.check_resume(configuration.load(saved), self.config)
        elif checkpoints.steps():
            raise ValueError(
                f"out: {self.config.run_dir} holds a run already, of which step "
                f"{checkpoints.steps()[-1]} is saved; go on with --resume, or choose another --out"
            )
        if self.config.steps < (checkpoints.steps() or [0])[-1]:
            raise ValueError(
                f"steps={self.config.steps}: the run in {self.config.run_dir} is at step "
                f"{checkpoints.steps()[-1]} already; ask for more, or leave --steps out"
            )
        checkpoints.check_writable(self.plan.shapes)
        return changes

    def fit(self) -> Result:
        """Trains to the last step, or until a signal; saves, evaluates, draws and samples.

        Raises:
          Diverged: the loss or its gradient became infinite or NaN.
          ValueError: the run folder is in use or holds a run; on resuming, no checkpoint is sound,
            or it belongs to another run.
        """
        with (
            StopSignals() as signals,
            Console(self.config) as console,
            locked(self.config.run_dir),
            self.open_checkpoints() as checkpoints,
        ):
            changes = self._check_run_dir(checkpoints)
            peak = find_peak(self.plan.wafer, self.config.dtype)
            console.show(header(self.plan, self.corpus, peak))
            if skipped := self.corpus.skipped:
                console.note(f"files without text passed over: {len(skipped)}; first: {skipped[0]}")
            with console.compiling():
                programs = compile_programs(self.plan)
            if programs.temporary_bytes is not None:
                console.note(f"a step has {programs.temporary_bytes / 1e6:,.1f} MB of temporaries")
            run = Run(
                programs,
                self.corpus,
                self.prompt,
                checkpoints,
                console,
                signals,
                peak.flops,
                tokenizer_from=self.start.path,
            )
            for line in changes:
                console.note(f"changed: {line}")
            configuration.save(self.config, self.config.run_dir / configuration.FILE_NAME)
            return run.to_the_end()


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


def _tokens(config: TrainingConfig, start: Start) -> Literal["bytes", "characters"] | Tokenizer:
    if start.tokenizer is not None and config.tokens == "checkpoint":
        return start.tokenizer
    return "characters" if config.tokens == "characters" else "bytes"


def _prompt(config: TrainingConfig, corpus: Corpus) -> Int[np.ndarray, " T"]:
    """The tokens that the sample goes on from; the data's own first one if it has no line's end."""
    if not config.sample_tokens:
        return corpus.train[:1].astype(np.int32)
    try:
        return corpus.encode(config.prompt)
    except ValueError as error:
        if config.prompt == TrainingConfig.prompt:
            return corpus.train[:1].astype(np.int32)
        raise ValueError(f"prompt={config.prompt!r}: {error}") from None
