"""The arguments of `python -m serving`, from flags and a file; imports no jax: `--help` is quick.

A flag wins over the file. In the file every flag has a key of its name, and `[[models]]` tables
say for one model what the keys at the top say for all:

    port = 8080
    max-loaded = 1
    [[models]]
    model = "/models/SmolLM2-135M-Instruct"
    name = "small"
    [[models]]
    model = "/models/Llama-3.2-1B.gguf"
    weights = "stored"
    load = "asked"
"""

import dataclasses
import math
import pathlib
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tyro

from serving.api.settings import Settings
from serving.config_file import check_values, read_config
from wsekern.error_line import print_error
from wsekern.wafer.launch import Platform, parse_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How each model is kept and run."""

    load: Literal["start", "asked"] = "start"
    """When the model is loaded: at the start, or when the first request asks for it."""
    max_streams: int = 32
    """Requests that run at once; others wait."""
    max_waiting: int = 1024
    """Requests that wait at most; more are answered with 429."""
    kv_tokens: int | None = None
    """Tokens whose keys and values are kept, of all requests together. None: as many as 256 MB
    hold."""
    kv_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Dtype of keys and values: int8 takes a quarter of the memory of float32. None: that of the
    arithmetic."""
    chunk: int = 128
    """Tokens of prompts that are read between two steps of the running requests."""
    lookup: bool = True
    """Whether few requests guess ahead, from what their texts have said already."""
    draft: str | None = None
    """A smaller model with the same tokenizer that guesses ahead for few requests: a folder, a
    GGUF file, or an id on the hub. The texts stay the same."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of parameters and arithmetic. None: the checkpoint's; float32 on a CPU."""
    weights: Literal["int8", "int4", "stored"] | None = None
    """How weights are kept: in eight or four bits, or as the blocks of a GGUF file. None: in
    `dtype`."""
    activations: Literal["int8", "int16"] | None = None
    """With int8 weights: what the inputs of products are rounded to, for speed. None: nothing."""

    def __post_init__(self) -> None:
        for name in ("max_streams", "max_waiting", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise ValueError(f"kv_tokens={self.kv_tokens} must be 1 or more")
        if self.activations is not None and self.weights != "int8":
            raise ValueError(f"activations={self.activations!r} needs weights='int8'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCommand:
    """A model to serve: where it is, what clients call it, and its options."""

    model: str
    name: str | None = None
    options: ModelOptions = ModelOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """Serve models behind the API that clients of OpenAI and Cerebras speak.

    Other commands, each with a --help: python -m serving bench | chat | soak.
    """

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A folder of safetensors, a GGUF file, or the id of a model on the Hugging Face hub. Given
    several times, all are served."""
    name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What clients call the model, once for each model. By default the name of the folder or
    file."""
    config: pathlib.Path | None = None
    """TOML file with these flags as keys, and [[models]] tables. A flag wins over the file."""
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
    max_loaded: int | None = None
    """Models in memory at once. Another one takes the place of the one that was used least
    recently and has no request; requests wait meanwhile. None: all."""
    idle_minutes: float | None = None
    """Minutes without a request after which a model leaves memory. None: never."""
    prompt_cache: pathlib.Path | None = None
    """Folder where prompts that were read are kept when a model leaves memory or the server ends:
    they are found again when it is loaded next. None: nowhere."""
    prompt_cache_mb: int = 1024
    """Size of each model's file in that folder, at most, in 10^6 bytes."""
    each_model: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()
    """How each model is kept and run."""
    http: tyro.conf.OmitArgPrefixes[Settings] = Settings()
    """How the HTTP interface behaves; times are in seconds, sizes in bytes."""
    models: tyro.conf.Suppress[tyro.conf.Fixed[tuple[ModelCommand, ...]]] = ()

    def __post_init__(self) -> None:
        if self.wafer is not None:
            parse_grid(self.wafer)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be from 0 to 65535")
        if self.max_loaded is not None and self.max_loaded < 1:
            raise ValueError(f"max_loaded={self.max_loaded} must be 1 or more")
        if self.idle_minutes is not None and not 0 < self.idle_minutes < math.inf:
            raise ValueError(f"idle_minutes={self.idle_minutes} must be above 0")
        if self.prompt_cache_mb < 1:
            raise ValueError(f"prompt_cache_mb={self.prompt_cache_mb} must be 1 or more")


def parse(argv: Sequence[str] | None = None) -> ServeCommand:
    """What `argv` and the file in it ask for; a wrong argument ends the process with status 2.

    The command's `models` are those to serve, each with its options.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        flags = tyro.cli(ServeCommand, prog="python -m serving", args=argv)
        flat = _flatten(flags)
        written = {arg.partition("=")[0].replace("_", "-") for arg in argv if arg[:2] == "--"}
        given = {
            name: value
            for name, value in flat.items()
            if written & {f"--{name}".replace("_", "-"), f"--no-{name}".replace("_", "-")}
        }
        return _combine(flags.config, given)
    except (ValueError, OSError) as error:
        print_error("python -m serving", error)
        raise SystemExit(2) from None


def _combine(file: pathlib.Path | None, given: dict[str, Any]) -> ServeCommand:
    """The command of a file and of the flags that were given."""
    top: dict[str, Any] = {}
    tables: list[dict[str, Any]] = []
    if file is not None:
        top, tables = _read(file)
    values = top | given
    if "model" in given or not tables:
        command = _build(ServeCommand, values, file)
        models = _models_of(command)
    elif "name" in given:
        raise ValueError(f"name={given['name']}: {file} names its models; give --model too")
    else:
        # What the top says of models need not make sense without their tables.
        of_server = {k: v for k, v in values.items() if k not in _hints(ModelOptions)}
        command = _build(ServeCommand, of_server, file)
        models = [
            ModelCommand(
                model=table["model"],
                name=table.get("name"),
                options=_build(ModelOptions, top | table | given, _where(file, number)),
            )
            for number, table in enumerate(tables, 1)
        ]
    at_start = sum(one.options.load == "start" for one in models)
    if command.max_loaded is not None and at_start > command.max_loaded:
        raise ValueError(
            f"{at_start} models are to be loaded at the start, max_loaded={command.max_loaded}; "
            "raise it, or give load=asked"
        )
    return dataclasses.replace(command, models=tuple(models))


def _models_of(command: ServeCommand) -> list[ModelCommand]:
    if not command.model:
        raise ValueError("no model; give --model FOLDER_OR_GGUF, or --config with a file of models")
    if command.name and len(command.name) != len(command.model):
        raise ValueError(
            f"there are {len(command.model)} of --model and {len(command.name)} of --name; give "
            "as many, in the same order"
        )
    names = command.name or [None] * len(command.model)
    return [
        ModelCommand(model=model, name=name, options=command.each_model)
        for model, name in zip(command.model, names, strict=True)
    ]


def _read(file: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The keys at the top of a file, and its tables of models; their types are checked."""
    written = read_config(file)
    tables = written.pop("models", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{file}: models is no list of tables; begin each with [[models]]")
    hints = _hints(ServeCommand)
    top = check_values(written, {k: v for k, v in hints.items() if k != "config"}, str(file))
    if tables and ({"model", "name"} & set(top)):
        raise ValueError(f"{file}: model and name stand beside [[models]]; put them into a table")
    of_model = {"model": str, "name": str} | _hints(ModelOptions)
    checked = []
    for number, table in enumerate(tables, 1):
        where = _where(file, number)
        checked.append(check_values(table, of_model, where))
        if "model" not in checked[-1]:
            raise ValueError(f'{where} has no model; say which, as in model = "FOLDER"')
    return top, checked


def _where(file: pathlib.Path | None, number: int) -> str:
    return f"{file}: [[models]] number {number}"


def _hints(kind: type) -> dict[str, Any]:
    """The types of the flags of a command by name, those of its parts among them."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            hints |= _hints(typing.cast(type, hint))
        elif name != "models":
            hints[name] = hint
    return hints


def _flatten(command: Any) -> dict[str, Any]:
    """The values of the flags of a command by name, those of its parts among them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        values |= _flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def _build(kind: type, values: Mapping[str, Any], where: object) -> Any:
    """A command, or a part of one, from the values of flags by name; others are as by default.

    Args:
      kind: the class.
      values: by name; those of other classes are ignored.
      where: the file that they are from, for messages; None: from flags alone.
    """
    fields: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            fields[name] = _build(typing.cast(type, hint), values, where)
        elif name in values:
            fields[name] = values[name]
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(str(error) if where is None else f"{where}: {error}") from None
