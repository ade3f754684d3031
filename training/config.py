"""This file is every choice that a training run has, and its command line; it imports no jax."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import pathlib
import sys
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from wsekern.atomic_write import atomic_write
from wsekern.wafer.launch import Platform, parse_grid

# What a resumed run may change: where and how long it runs and what it shows. All else decides the
# losses, so the two halves would not be one run.
MAY_CHANGE = frozenset(
    {
        "init",  # whose sizes and tokens are compared by their shapes and fingerprint
        "wafer",
        "virtual",
        "platform",
        "data",  # whose content is compared by its fingerprint
        "steps",
        "remat",
        "microbatch",
        "eval_every",
        "eval_batches",
        "out",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep",
        "sample_tokens",
        "prompt",
        "temperature",
        "log_every",
    }
)
# How this process was started rather than what the run is: neither saved nor compared.
_OF_THE_CALL = frozenset({"resume", "config"})
FILE_NAME = "config.json"  # of the resolved configuration, in the run folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every choice of a training run; defaults train a small decoder in a few minutes on a CPU."""

    preset: str = "nano"
    """The model's sizes: nano, 20m, 125m, 1b, 8b, gpt2-124m, ...; `python -m models info NAME`."""
    init: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|GGUF|ID")] = None
    """Checkpoint whose sizes, weights and tokenizer to start from, instead of a preset."""
    wafer: str = "2x4"
    """Grid of PEs: HEIGHTxWIDTH, or WAFERSxHEIGHTxWIDTH."""
    virtual: bool = False
    """Run the PEs virtually, all on one device, instead of one PE a device."""
    platform: Platform | None = None
    """Kind of device; cpu makes as many emulated devices as PEs. None: what JAX finds."""
    data: Annotated[
        Sequence[str],
        tyro.conf.arg(
            metavar="FILE|DIR|GLOB", help_behavior_hint="(default: Python's standard library)"
        ),
    ] = ()
    """Text to train on, one source or several."""
    tokens: Literal["bytes", "characters", "checkpoint"] | None = None
    """A token is a byte of UTF-8, a character (vocabulary: those in the text, sorted), or of the
    tokenizer of --init. None: of the checkpoint that there is, else bytes."""
    validation_fraction: float = 0.1
    """Share of the data kept for validation: whole files, or the end of a single one."""
    context: int | None = None
    """Length of a sequence, tokens. None: the preset's; of --init, 1024 at most."""
    batch: int = 12
    """Sequences in a step, over all wafers."""
    microbatch: int | None = None
    """Sequences in one accumulation pass, over all wafers. None: the whole batch at once."""
    steps: int = 300
    """Optimizer steps, counted from the start of the run."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float | None = None
    """Learning rate at the end. None: a tenth of the highest."""
    warmup: int = 20
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; wsd is constant, then linear to the end."""
    decay_fraction: float = 0.2
    """Share of the steps that the final decay of wsd takes."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient, per step."""
    beta2: float = 0.99
    """Adam's decay of the mean squared gradient, per step."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two dimensions or more, per unit of learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in; weights and optimizer state are float32 in any case."""
    remat: bool = False
    """Compute each layer's activations again in the backward pass: less memory, more time."""
    seed: int = 0
    """Of the initial weights, the batches and the sample."""
    eval_every: int = 100
    """Steps between evaluations on the validation data; 0: only at the end."""
    eval_batches: int = 20
    """Batches in an evaluation."""
    out: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET)")
    ] = None
    """Run folder: checkpoints, metrics.jsonl, loss curve, config.json."""
    resume: bool = False
    """Go on from the run folder's newest good checkpoint, with the choices saved there."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of choices to start from; flags given beside it win."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only by the clock, when stopped, and at the end."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; 0: not by the clock."""
    keep: int = 3
    """Checkpoints kept, the newest ones."""
    sample_tokens: int = 200
    """Length of the text sampled at the end, tokens; 0: none."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a line's end)")] = "\n"
    """Text that the sample goes on from."""
    temperature: float = 0.8
    """Of the sample; 0 always takes the likeliest token."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and of output that is not a terminal."""

    def __post_init__(self) -> None:
        # A str is one source, as on the command line; a tuple can be hashed, a list cannot.
        if isinstance(self.data, str | list):
            data = (self.data,) if isinstance(self.data, str) else tuple(self.data)
            object.__setattr__(self, "data", data)
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        _check_ranges(self)
        _check_batch(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Wafers, and height and width of each, PEs."""
        return parse_grid(self.wafer)

    @property
    def pes(self) -> int:
        """PEs over all wafers."""
        wafers, height, width = self.grid
        return wafers * height * width

    @property
    def devices(self) -> int:
        """Devices that the run needs: one for each PE, or one for all virtual PEs."""
        return 1 if self.virtual else self.pes

    @property
    def passes(self) -> int:
        """Accumulation passes in a step."""
        return self.batch // (self.microbatch or self.batch)

    @property
    def final_learning_rate(self) -> float:
        """Learning rate at the end."""
        given = self.min_learning_rate
        return self.learning_rate / 10 if given is None else given

    @property
    def run_dir(self) -> pathlib.Path:
        """The run folder."""
        return pathlib.Path(self.out or pathlib.Path("runs", pathlib.Path(self.model).stem))

    @property
    def model(self) -> str:
        """What the model starts from, for people: a checkpoint, or a preset's name."""
        return self.init or self.preset


def parse(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration that a command line asks for; ends the process where it cannot be had.

    It starts from the file of `--config`, or with `--resume` from the one saved in the run folder,
    or from the defaults; flags given win. A flag that does not exist, a value that does not fit and
    an unreadable file are named on standard error, with exit status 2.

    Args:
      argv: the flags; None: those of this process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return tyro.cli(
            TrainingConfig,
            prog="python -m training",
            description="Trains a language model on a wafer mesh.",
            default=_starting_point(argv),
            args=argv,
        )
    except (ValueError, OSError) as error:
        print(f"python -m training: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def resolve_config(config: TrainingConfig, context: int) -> TrainingConfig:
    """`config` with a value for every choice that was left to be found.

    Args:
      config: as it was given.
      context: the preset's, tokens.
    """
    return dataclasses.replace(
        config,
        tokens=config.tokens or ("checkpoint" if config.init else "bytes"),
        context=config.context or context,
        microbatch=config.microbatch or config.batch,
        min_learning_rate=config.final_learning_rate,
        out=str(config.run_dir),
    )


def save_config(config: TrainingConfig, path: str | pathlib.Path) -> None:
    """Writes `config` to `path` as JSON, whole or not at all."""
    fields = dataclasses.asdict(config)
    kept = {name: value for name, value in fields.items() if name not in _OF_THE_CALL}
    kept["data"] = [os.path.abspath(os.path.expanduser(item)) for item in config.data]
    if config.init and os.path.exists(config.init):
        kept["init"] = os.path.abspath(config.init)
    with atomic_write(path) as file:
        file.write((json.dumps(kept, indent=2) + "\n").encode())


def load_config(path: str | pathlib.Path) -> TrainingConfig:
    """The configuration in a JSON file; what the file does not name has its default.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, or a name or value in it does not fit.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} is not a file; give a saved config.json")
    try:
        return _from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"config={str(path)!r}: {error}") from None


def config_differences(saved: TrainingConfig, now: TrainingConfig) -> list[str]:
    """What differs between two runs, a line a field, such as `"seed: 0 was saved, 1 is given"`."""
    return [_difference(name, saved, now) for name in _differing(saved, now)]


def check_resume(saved: TrainingConfig, now: TrainingConfig) -> list[str]:
    """The differences that a resumed run is free to have, as `config_differences` words them.

    Raises:
      ValueError: others differ, each of which is named.
    """
    fixed = [name for name in _differing(saved, now) if name not in MAY_CHANGE]
    if fixed:
        raise ValueError(
            "a resumed run keeps what decides its losses, but "
            + "; ".join(_difference(name, saved, now) for name in fixed)
            + "; leave these out, or start a new run with another --out"
        )
    return config_differences(saved, now)


def _differing(saved: TrainingConfig, now: TrainingConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    return [
        name
        for name in names
        if name not in _OF_THE_CALL and getattr(saved, name) != getattr(now, name)
    ]


def _difference(name: str, saved: TrainingConfig, now: TrainingConfig) -> str:
    return f"{name}: {getattr(saved, name)!r} was saved, {getattr(now, name)!r} is given"


def _starting_point(argv: Sequence[str]) -> TrainingConfig:
    # These flags say which configuration the others change, so they are read ahead of tyro, which
    # then reads all of them and makes the complaints.
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--config", "--out", "--preset", "--init"):
        ahead.add_argument(flag, nargs="?")
    ahead.add_argument("--resume", action=argparse.BooleanOptionalAction)
    try:
        flags, _ = ahead.parse_known_args(argv)
    except argparse.ArgumentError:
        return TrainingConfig()
    if flags.config:
        return load_config(flags.config)
    named = {"out": flags.out, "init": flags.init}
    named |= {"preset": flags.preset} if flags.preset else {}
    saved = TrainingConfig(**named).run_dir / FILE_NAME
    if flags.resume and saved.is_file():
        return dataclasses.replace(load_config(saved), out=flags.out)
    return TrainingConfig()


def _from_json(text: str) -> TrainingConfig:
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError(f"it holds a {type(given).__name__}, not an object of names and values")
    known = [f.name for f in dataclasses.fields(TrainingConfig) if f.name not in _OF_THE_CALL]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; names are {known}"
            raise ValueError(f"{name!r} is not a name of a choice{hint}")
    return TrainingConfig(**given)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        wanted = getattr(hint, "__name__", str(hint))
        if typing.get_origin(hint) or isinstance(hint, types.UnionType):
            wanted = str(hint).replace("typing.", "").replace("collections.abc.", "")
        raise ValueError(f"{name}={value!r} is not of type {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in arguments
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, argument) for argument in arguments)
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):  # which Python counts as an int
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _check_ranges(config: TrainingConfig) -> None:
    at_least_one = ("batch", "microbatch", "context", "steps", "eval_batches", "keep", "log_every")
    not_negative = (
        *("warmup", "eval_every", "checkpoint_every", "sample_tokens"),
        *("weight_decay", "clip_norm", "checkpoint_minutes", "temperature", "min_learning_rate"),
    )
    # name -> (fits, what would)
    rules = {name: (lambda v: v >= 1, "1 or more") for name in at_least_one}
    rules |= {name: (lambda v: v >= 0, "0 or more") for name in not_negative}
    rules |= {name: (lambda v: 0 <= v < 1, "from 0 to below 1") for name in ("beta1", "beta2")}
    rules["seed"] = (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1")
    rules["learning_rate"] = (lambda v: v > 0, "above 0")
    rules["validation_fraction"] = (lambda v: 0 < v < 1, "between 0 and 1, both left out")
    rules["decay_fraction"] = (lambda v: 0 < v <= 1, "above 0 and at most 1")
    for name, (fits, wanted) in rules.items():
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and fits(value)):
            raise ValueError(f"{name}={value} does not fit; it must be {wanted}")
    if config.final_learning_rate > config.learning_rate:
        raise ValueError(
            f"min_learning_rate={config.min_learning_rate} is above "
            f"learning_rate={config.learning_rate}; lower the one or raise the other"
        )
    if config.sample_tokens and not config.prompt:
        raise ValueError("prompt is empty; give at least one character, or sample_tokens=0")
    if not config.preset:
        raise ValueError("preset is empty; give the name of one, such as nano")
    wrong = "checkpoint" if config.init is None else "characters"
    if config.tokens == wrong:
        raise ValueError(
            f"tokens={wrong!r} with init={config.init!r}: "
            + ("name the checkpoint with --init" if config.init is None else "it knows its own")
        )


def _check_batch(config: TrainingConfig) -> None:
    wafers, _, _ = config.grid
    together = config.microbatch or config.batch
    which = "batch" if config.microbatch is None else "microbatch"
    if together % wafers:
        raise ValueError(
            f"{which}={together} is not a multiple of the {wafers} wafers of "
            f"wafer={config.wafer!r}; use {_near(together, wafers)}"
        )
    if config.batch % together:
        raise ValueError(
            f"batch={config.batch} is not a multiple of microbatch={together}; "
            f"use batch={_near(config.batch, together)}, or another microbatch"
        )


def _near(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
