"""This file is what `python -m models` can be told; without jax, so that `--help` is quick."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from wsekern.wafer.launch import parse_grid

Platform = Literal["cpu", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continues a prompt, or answers it as a chat; the text goes to standard output as it comes."""

    model: str
    """A folder of safetensors, a GGUF file, or the id of a model on the Hugging Face hub."""
    prompt: tuple[str, ...]
    """What to continue; several are continued together, and printed one after another."""
    chat: bool = False
    """Whether prompts are what a user says, in the checkpoint's chat template."""
    system: str | None = None
    """With --chat: what the model is told first."""
    max_new_tokens: int = 128
    """How many tokens to add at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values sample more freely."""
    top_k: int | None = None
    """Sample among that many likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that have this much of the probability together."""
    seed: int = 0
    """Of the sampling: the same seed gives the same text."""
    logprobs: bool = False
    """Whether to write each token and its log-probability (nats) to standard error."""
    wafer: str | None = None
    """Grid of devices, HEIGHTxWIDTH; emulated on a CPU. None: one device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of parameters and compute. None: the checkpoint's, and float32 on a CPU."""
    platform: Platform | None = None
    """Kind of device. None: what jax prefers."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("prompt: there is none; give one, as --prompt 'Once upon a time'")
        if self.system is not None and not self.chat:
            raise ValueError("system is only said in a chat; add --chat")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.wafer is not None:
            parse_grid(self.wafer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Says what a checkpoint or a preset is: family, sizes, parameters, bytes; reads no weights."""

    model: str
    """A folder, a GGUF file, the id of a model, or the name of a preset."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Writes a checkpoint (a folder or a GGUF file) as a folder of safetensors."""

    model: str
    """A folder, a GGUF file, or the id of a model."""
    out: pathlib.Path
    """The folder to write; it must not hold anything yet."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters written. None: those of the checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Says what a model takes of wafers that nobody has: time, memory, energy; runs nothing.

    A layer is laid out as WaferLLM lays it out, and priced by the estimator of `wsekern`.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A preset, a folder, a GGUF file, or the id of a model."""
    machine: str = "cs-3"
    """A wafer or its system (cs-1, cs-2, cs-3), andromeda (16 CS-2), or a chip such as h100."""
    wafers: int | None = None
    """How many, or how many chips. None: one; of andromeda all; as many chips as hold the model."""
    mode: Literal["decode", "prefill", "train"] = "decode"
    """A token of each sequence, whole prompts, or a training step."""
    context: int | None = None
    """Tokens of a sequence. None: the model's, at most 4096."""
    batch: int | None = None
    """Sequences. None: 1; in training, as many as hide the way of the weights."""
    side: int | None = None
    """Regions of the wafer are SIDE x SIDE PEs. None: the best."""
    clock: float | None = None
    """GHz. None: the machine's."""
    html: pathlib.Path | None = None
    """Where to write a report as a web page. None: nowhere."""
    json: bool = False
    """Whether to print JSON instead of tables."""


Command = (
    Annotated[GenerateCommand, tyro.conf.subcommand("generate")]
    | Annotated[InfoCommand, tyro.conf.subcommand("info")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
)


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command of `argv`; ends the process with status 2 where it is not understood."""
    try:
        return tyro.cli(
            Command,
            prog="python -m models",
            description="Runs, describes, converts and plans language models.",
            args=argv,
        )
    except ValueError as error:
        raise SystemExit(f"python -m models: error: {error}") from None
