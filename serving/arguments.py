"""The arguments of `python -m serving`; imports no jax, so that `--help` is quick."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import tyro

from wsekern.error_line import print_error
from wsekern.wafer.launch import Platform, parse_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Serve a model behind the API that clients of OpenAI and Cerebras speak.

    Other commands, each with a --help: python -m serving bench | chat.
    """

    model: str
    """A folder of safetensors, a GGUF file, or the id of a model on the Hugging Face hub."""
    name: str | None = None
    """What clients call the model. None: the name of the folder or file."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    wafer: str | None = None
    """Grid of devices, HEIGHTxWIDTH, emulated on a CPU. None: one device."""
    platform: Platform | None = None
    """Kind of device. None: whatever JAX prefers."""
    api_key_file: pathlib.Path | None = None
    """File with a key a line; every request but /health must bring one. None: no key is needed."""
    max_streams: int = 32
    """Requests that run at once; others wait."""
    max_waiting: int = 1024
    """Requests that wait at most; more are answered with 429."""
    kv_tokens: int | None = None
    """Tokens whose keys and values are kept, of all requests together. None: as many as 256 MB
    hold."""
    chunk: int = 128
    """Tokens of prompts that are read between two steps of the running requests."""
    lookup: bool = True
    """Whether few requests guess ahead, from what their texts have said already."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of parameters and arithmetic. None: the checkpoint's; float32 on a CPU."""
    weights: Literal["int8", "int4", "stored"] | None = None
    """How weights are kept: in eight or four bits, or as the blocks of a GGUF file. None: in
    `dtype`."""
    log_prompts: bool = False
    """Write prompts and answers to the log."""

    def __post_init__(self) -> None:
        if self.wafer is not None:
            parse_grid(self.wafer)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be from 0 to 65535")
        for name in ("max_streams", "max_waiting", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise ValueError(f"kv_tokens={self.kv_tokens} must be 1 or more")


def parse(argv: Sequence[str] | None = None) -> ServeCommand:
    """What `argv` asks for; a wrong argument ends the process with status 2."""
    try:
        return tyro.cli(ServeCommand, prog="python -m serving", args=argv)
    except ValueError as error:
        print_error("python -m serving", error)
        raise SystemExit(2) from None
