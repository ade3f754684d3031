"""The arguments of `python -m models`; imports no jax, so that `--help` is quick."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from models.checkpoints.json_file import parse_json, shown
from wsekern.error_line import print_error
from wsekern.wafer.launch import Platform, parse_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a prompt, or answer it as a chat; standard output gets the text as it is made."""

    model: str
    """A folder of safetensors, a GGUF file, or the id of a model on the Hugging Face hub."""
    prompt: tuple[str, ...]
    """The text to continue. Several prompts run as one batch and are printed in order."""
    chat: bool = False
    """Send each prompt as a user's message, in the checkpoint's chat template."""
    system: str | None = None
    """With --chat: the system message that comes first."""
    chat_options: str = "{}"
    """With --chat: variables of the template, in JSON, such as '{"enable_thinking": false}'."""
    max_new_tokens: int | None = None
    """The most tokens to add. None: 128, or fewer if the model's context ends before."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values sample more freely."""
    top_k: int | None = None
    """Sample among the K likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens whose probabilities sum to P."""
    seed: int = 0
    """Random seed for sampling; the same seed gives the same text."""
    logprobs: bool = False
    """Write each token and its log-probability (nats) to standard error."""
    wafer: str | None = None
    """Grid of devices, HEIGHTxWIDTH, emulated on a CPU. None: one device."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of parameters and arithmetic. None: the checkpoint's; float32 on a CPU."""
    platform: Platform | None = None
    """Kind of device. None: whatever JAX prefers."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: there is none; give one, as --prompt 'Once upon a time'")
        if self.system is not None and not self.chat:
            raise ValueError("system is only said in a chat; add --chat")
        if self.template_options and not self.chat:
            raise ValueError("chat_options are for a chat; add --chat")
        if "messages" in self.template_options:
            raise ValueError("chat_options has 'messages', but each prompt is one; leave it out")
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"seed={shown(self.seed)} does not fit; it must be from 0 to 2**32 - 1"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")
        if self.wafer is not None:
            parse_grid(self.wafer)

    @property
    def template_options(self) -> dict[str, Any]:
        """The template's variables that `chat_options` spells."""
        return parse_json(self.chat_options.encode(errors="replace"), "chat_options")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoCommand:
    """Describe a checkpoint or a preset: family, sizes, parameters, bytes. Reads no weights."""

    model: str
    """A folder, a GGUF file, the id of a model on the hub, or the name of a preset."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """Write a checkpoint (a folder or a GGUF file) as a folder of safetensors."""

    model: str
    """A folder, a GGUF file, or the id of a model on the hub."""
    out: pathlib.Path
    """The folder to write; it must be empty or new."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the parameters written. None: the checkpoint's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Plan a model on wafers that you need not own: time, memory, energy. Runs nothing.

    A layer is laid out as in WaferLLM and priced by wsekern's estimator.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A preset, a folder, a GGUF file, or the id of a model on the hub."""
    machine: str = "cs-3"
    """A wafer or its system (cs-1, cs-2, cs-3), andromeda (16 CS-2), or a chip such as h100."""
    wafers: int | None = None
    """Number of wafers or chips. None: one wafer; andromeda's 16; or the fewest chips that fit."""
    mode: Literal["decode", "prefill", "train"] = "decode"
    """What to time: one token of each sequence, whole prompts, or a training step."""
    context: int | None = None
    """Tokens of a sequence. None: the model's context, at most 4096."""
    batch: int | None = None
    """Sequences. None: 1; for training, enough to hide the streaming of the weights."""
    side: int | None = None
    """Cut the wafer into regions of SIDE x SIDE PEs. None: the fastest size."""
    clock: float | None = None
    """Clock in GHz. None: the machine's."""
    target: Annotated[str | None, tyro.conf.arg(metavar="TOPOLOGY")] = None
    """Instead of wafers: compile the real program for TPUs or GPUs that need not be there, such as
    v6e:16x16 or h100:2x4."""
    layouts: tuple[str, ...] = ()
    """With --target: grids of the same chips to compare, such as 16x16 8x32 4x8x8."""
    largest_batch: bool = False
    """With --target: find the largest batch that fits, by bisection from --batch."""
    html: pathlib.Path | None = None
    """Write a report to this file as a web page. None: no report."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        if self.target is None and (self.layouts or self.largest_batch):
            raise ValueError("layouts and largest_batch are of a compilation; give --target too")
        for grid in self.layouts:
            parse_grid(grid)
        for name in ("batch", "context"):
            value = getattr(self, name)
            if self.target is not None and value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")


Command = (
    Annotated[GenerateCommand, tyro.conf.subcommand("generate")]
    | Annotated[InfoCommand, tyro.conf.subcommand("info")]
    | Annotated[ConvertCommand, tyro.conf.subcommand("convert")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
)


def parse(argv: Sequence[str] | None = None) -> Command:
    """The command that `argv` asks for; a wrong argument ends the process with status 2."""
    try:
        return tyro.cli(
            Command,
            prog="python -m models",
            description="Run, describe, convert and plan language models.",
            args=argv,
        )
    except ValueError as error:
        print_error("python -m models", error)
        raise SystemExit(2) from None
