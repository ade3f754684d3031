"""Every choice of a training run, and its command line; imports no jax."""

import argparse
import dataclasses
import difflib
import json
import os
import pathlib
import sys
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from models.checkpoints.json_file import read_json, shown
from training.run_folder import CONFIG
from wsekern.atomic_write import atomic_write
from wsekern.error_line import print_error
from wsekern.moved import moved_names
from wsekern.wafer.launch import Platform, parse_grid

if not TYPE_CHECKING:  # a type checker would take every name for one of this module
    __getattr__ = moved_names(__name__)

# A resumed run may change where and how long it runs, and what it shows. The other fields decide
# the losses: if one changed, the two halves would not be one run.
MAY_CHANGE = frozenset(
    {
        "init",  # instead, shapes and the fingerprint of the tokens are compared
        "wafer",
        "virtual",
        "platform",
        "data",  # instead, the fingerprint of its content is compared
        "steps",
        "remat",
        "split_state",
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
# Fields about how this process was started, not about the run: neither saved nor compared.
_OF_THE_CALL = frozenset(
    {"resume", "config", "compile_only", "target", "layouts", "largest_batch", "html"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every choice of a training run. The defaults train a small decoder on a CPU in minutes."""

    preset: str = "nano"
    """Sizes of the model: nano, 20m, 125m, 1b, 8b, ... See `python -m models info --model NAME`."""
    init: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|GGUF|ID")] = None
    """Checkpoint to take sizes, weights and tokenizer from, instead of a preset."""
    wafer: str = "2x4"
    """Grid of PEs: HEIGHTxWIDTH, or WAFERSxHEIGHTxWIDTH."""
    virtual: bool = False
    """Run all PEs virtually on one device, instead of one PE on each device."""
    platform: Platform | None = None
    """Kind of device; cpu emulates a device for each PE. None: whatever JAX prefers."""
    data: Annotated[
        Sequence[str],
        tyro.conf.arg(
            metavar="FILE|DIR|GLOB", help_behavior_hint="(default: Python's standard library)"
        ),
    ] = ()
    """Text to train on: one source or several."""
    tokens: Literal["bytes", "characters", "checkpoint"] | None = None
    """A token is a byte of UTF-8, a character (the vocabulary is those in the text), or one of the
    tokenizer of --init. None: checkpoint with --init, else bytes."""
    validation_fraction: float = 0.1
    """Share of the data for validation: whole files, or the end of a single file."""
    context: int | None = None
    """Tokens in a sequence. None: the model's context, with --init at most 1024."""
    batch: int = 12
    """Sequences in a step, all wafers together."""
    microbatch: int | None = None
    """Sequences in one accumulation pass, all wafers together. None: the whole batch."""
    steps: int = 300
    """Optimizer steps in all, counted from the start of the run."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    min_learning_rate: float | None = None
    """Learning rate at the end. None: a tenth of the highest."""
    warmup: int = 20
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warm-up. wsd: constant, then linear to the end."""
    decay_fraction: float = 0.2
    """Share of the steps in the final decay of wsd."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient, per step."""
    beta2: float = 0.99
    """Adam's decay of the mean squared gradient, per step."""
    weight_decay: float = 0.1
    """Decoupled decay of parameters with two dimensions or more, per unit of learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the model computes in; weights and optimizer state are always float32."""
    remat: bool = False
    """Recompute each layer's activations in the backward pass: less memory, more time."""
    split_state: bool = False
    """Split weights and optimizer state over the wafers too, instead of repeating them on each:
    less memory; a layer's weights are gathered when it computes."""
    seed: int = 0
    """Random seed of the initial weights, the batches and the sample."""
    eval_every: int = 100
    """Steps between evaluations on the validation data. 0: only at the end."""
    eval_batches: int = 20
    """Batches in an evaluation."""
    out: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET)")
    ] = None
    """Run folder, for checkpoints, metrics.jsonl, the loss curve and config.json."""
    resume: bool = False
    """Continue from the newest good checkpoint in the run folder, with the choices saved there."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file of choices to start from; other flags override it."""
    checkpoint_every: int = 0
    """Steps between checkpoints. 0: only by the clock, when stopped, and at the end."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints. 0: not by the clock."""
    keep: int = 3
    """How many checkpoints to keep: the newest ones."""
    sample_tokens: int = 200
    """Tokens of text to sample at the end. 0: none."""
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a line's end)")] = "\n"
    """Text that the sample continues."""
    temperature: float = 0.8
    """Temperature of the sample. 0: always the likeliest token."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, and of output if it is not a terminal."""
    compile_only: bool = False
    """Compile the step for the chips of --target, report what their compiler makes of it, and end.
    No chip is needed, and no data."""
    target: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """With --compile-only: the chips, such as v5e:16x16, v5p:4x4x4 or h100:2x4. The grid is theirs,
    unless --wafer is another one of as many."""
    layouts: Annotated[Sequence[str], tyro.conf.arg(metavar="GRID")] = ()
    """With --compile-only: grids of the same chips to compare, such as 16x16 8x32 4x8x8."""
    largest_batch: bool = False
    """With --compile-only: find the largest batch that fits, by bisection from --batch."""
    html: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --compile-only: write the report to this file as a web page."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _paths(self.data))
        object.__setattr__(self, "layouts", _paths(self.layouts))
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name, empty in (("data", "" in self.data), ("init", self.init == "")):
            if empty:  # such as an empty variable of a shell
                raise ValueError(f"{name}='' is empty; name a file or a folder, or leave it out")
        _check_ranges(self)
        _check_batch(self)
        _check_compile_only(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Wafers, and the height and width of each, in PEs."""
        return parse_grid(self.wafer)

    @property
    def pes(self) -> int:
        """PEs of all wafers together."""
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
        lowest = self.min_learning_rate
        return self.learning_rate / 10 if lowest is None else lowest

    @property
    def run_dir(self) -> pathlib.Path:
        """The run folder."""
        default = pathlib.Path("runs", pathlib.Path(self.model).stem)
        return pathlib.Path(os.path.expanduser(self.out)) if self.out else default

    @property
    def model(self) -> str:
        """Name of the model that training starts from: a checkpoint, or a preset."""
        return self.init or self.preset


def parse(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration of a command line; a wrong flag ends the process.

    It starts from the file of `--config`, or with `--resume` from the one saved in the run folder,
    or else from the defaults; the other flags override it. An unknown flag, a bad value or an
    unreadable file is named on standard error, with exit status 2.

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
    except BrokenPipeError:  # the reader of --help has gone
        raise
    except (ValueError, OSError) as error:
        print_error("python -m training", error)
        raise SystemExit(2) from None


def resolve_config(config: TrainingConfig, context: int) -> TrainingConfig:
    """`config` with a value for every field that was None.

    Args:
      config: the configuration as given.
      context: the model's context, in tokens.
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
    saved = {name: value for name, value in fields.items() if name not in _OF_THE_CALL}
    # Absolute paths: the run may be resumed from another folder.
    saved["data"] = [os.path.abspath(os.path.expanduser(item)) for item in config.data]
    if config.init and os.path.exists(config.init):
        saved["init"] = os.path.abspath(config.init)
    with atomic_write(path) as file:
        file.write((json.dumps(saved, indent=2) + "\n").encode())


def load_config(path: str | pathlib.Path) -> TrainingConfig:
    """The configuration in a JSON file; fields that it does not name have their defaults.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, or has an unknown name or a bad value.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} is not a file; give a saved config.json")
    fields = read_json(path)
    try:
        return _from_fields(fields)
    except ValueError as error:
        raise ValueError(f"config={str(path)!r}: {error}") from None


def choices_of_losses(config: TrainingConfig) -> dict[str, Any]:
    """The fields that decide the losses, by name, as JSON gives them back."""
    fields = dataclasses.asdict(config)
    return {
        name: value
        for name, value in fields.items()
        if name not in MAY_CHANGE and name not in _OF_THE_CALL
    }


def config_differences(saved: TrainingConfig, now: TrainingConfig) -> list[str]:
    """A line for each field that differs, such as `"seed: 0 was saved, 1 is given"`."""
    return [_difference(name, saved, now) for name in _differing(saved, now)]


def check_resume(saved: TrainingConfig, now: TrainingConfig) -> list[str]:
    """A line for each difference, all of which a resumed run may have.

    Raises:
      ValueError: fields differ that must not; each is named.
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
    # These flags choose the configuration that the others change, so they are read before tyro,
    # which then reads all flags and reports the errors.
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
    chosen = {"out": flags.out, "init": flags.init}
    chosen |= {"preset": flags.preset} if flags.preset else {}
    saved = TrainingConfig(**chosen).run_dir / CONFIG
    if flags.resume and saved.is_file():
        return dataclasses.replace(load_config(saved), out=flags.out)
    return TrainingConfig()


def _from_fields(fields: dict[str, Any]) -> TrainingConfig:
    known = [f.name for f in dataclasses.fields(TrainingConfig) if f.name not in _OF_THE_CALL]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; names are {known}"
            raise ValueError(f"{name!r} is not a name of a choice{hint}")
    return TrainingConfig(**fields)


def _paths(data: Any) -> Any:
    """The paths in `data`, as a tuple of str; anything else as it is, for `_check_type`."""
    # A str is one source, as on the command line; a tuple can be hashed, a list cannot.
    sources = (data,) if isinstance(data, str | os.PathLike) else data
    if not isinstance(sources, list | tuple):
        return data
    return tuple(os.fspath(item) if isinstance(item, os.PathLike) else item for item in sources)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        expected = getattr(hint, "__name__", str(hint))
        if typing.get_origin(hint) or isinstance(hint, types.UnionType):
            expected = str(hint).replace("typing.", "").replace("collections.abc.", "")
        hint_for_data = "; give a path, or a sequence of paths" if name == "data" else ""
        raise ValueError(f"{name}={shown(value)} is not of type {expected}{hint_for_data}")


def _fits(value: Any, hint: Any) -> bool:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in arguments
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, argument) for argument in arguments)
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if isinstance(value, bool):  # in Python a bool is an int
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _check_ranges(config: TrainingConfig) -> None:
    at_least_one = ("batch", "microbatch", "context", "steps", "eval_batches", "keep", "log_every")
    not_negative = (
        *("warmup", "eval_every", "checkpoint_every", "sample_tokens"),
        *("weight_decay", "clip_norm", "checkpoint_minutes", "temperature", "min_learning_rate"),
    )
    # name -> (test, the text of what would pass)
    rules = {name: (lambda v: 1 <= v < 2**31, "1 or more, below 2**31") for name in at_least_one}
    rules |= {name: (lambda v: 0 <= v < 2**31, "0 or more, below 2**31") for name in not_negative}
    rules |= {name: (lambda v: 0 <= v < 1, "from 0 to below 1") for name in ("beta1", "beta2")}
    rules["seed"] = (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1")
    rules["learning_rate"] = (lambda v: 0 < v < 2**31, "above 0")
    rules["validation_fraction"] = (lambda v: 0 < v < 1, "between 0 and 1, both left out")
    rules["decay_fraction"] = (lambda v: 0 < v <= 1, "above 0 and at most 1")
    for name, (fits, expected) in rules.items():
        value = getattr(config, name)
        if value is not None and not fits(value):  # NaN fits no rule
            raise ValueError(f"{name}={shown(value)} does not fit; it must be {expected}")
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


def _check_compile_only(config: TrainingConfig) -> None:
    if config.compile_only:
        if config.target is None:
            raise ValueError("compile_only needs chips to compile for; give --target v5e:4x4")
        if config.virtual:
            raise ValueError("virtual: chips are compiled for with a PE on each; leave it out")
        for grid in config.layouts:
            parse_grid(grid)
        return
    for name, flag in (("target", "target"), ("layouts", "layouts"), ("html", "html"),
                       ("largest_batch", "largest-batch")):  # fmt: skip
        if getattr(config, name):
            raise ValueError(f"{name} is of a compilation; add --compile-only, or drop --{flag}")


def _check_batch(config: TrainingConfig) -> None:
    wafers, _, _ = config.grid
    together = config.microbatch or config.batch
    field = "batch" if config.microbatch is None else "microbatch"
    if together % wafers:
        raise ValueError(
            f"{field}={together} is not a multiple of the {wafers} wafers of "
            f"wafer={config.wafer!r}; use {_multiples_near(together, wafers)}"
        )
    if config.batch % together:
        raise ValueError(
            f"batch={config.batch} is not a multiple of microbatch={together}; "
            f"use batch={_multiples_near(config.batch, together)}, or another microbatch"
        )


def _multiples_near(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)
