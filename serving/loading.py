"""Load a checkpoint into an engine that serves it."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import AsyncIterator, Mapping, Sequence

from models.checkpoints.hub import find
from models.checkpoints.reading import load, read_config
from models.text.reading import load_tokenizer
from serving.api.app import build_app
from serving.api.logs import write_logs
from serving.api.registry import ModelCard, Served, State
from serving.api.server import HttpServer
from serving.api.settings import Settings
from serving.arguments import ServeCommand
from serving.engine import Engine
from serving.text.model_text import ModelText
from wsekern.wafer.launch import find_devices, make_wafer


class OneModel:
    """A model that is loaded while the server listens already."""

    def __init__(self, command: ServeCommand) -> None:
        """Reads the config alone.

        Raises:
          ValueError: it is no checkpoint of a known family.
          FileNotFoundError: there is no such checkpoint.
        """
        self._command = command
        self._path = find(command.model)
        config = read_config(self._path)
        name = command.name or name_of(self._path)
        self.state: State = "loading"
        self.cards: Sequence[ModelCard] = (ModelCard(name=name, context=config.context),)
        self._served: Served | None = None

    @property
    def loaded(self) -> Mapping[str, Served]:
        """The model by name, once it is in memory."""
        return {} if self._served is None else {self._served.card.name: self._served}

    def load(self) -> None:
        """Loads the model and its programs; takes requests afterwards."""
        try:
            self._served = load_served(self._command, self._path, self.cards[0].name)
        except BaseException:
            self.state = "failed"
            raise
        self.cards = (self._served.card,)
        self.state = "ready"

    @contextlib.asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[Served]:
        """The model; KeyError: it has another name."""
        yield self.loaded[name]

    def close(self, timeout: float) -> None:
        """Closes the engine."""
        if self._served is not None:
            self._served.engine.close(timeout)


def load_served(command: ServeCommand, path: pathlib.Path, name: str) -> Served:
    """A checkpoint with its engine.

    Args:
      command: says where it goes and how it is kept.
      path: of the checkpoint.
      name: what clients call it.

    Raises:
      ValueError: it does not load; says why.
    """
    wafer = None
    if command.wafer is None:
        find_devices(command.platform)  # refuses a platform that is not there
    else:
        wafer = make_wafer(command.wafer, command.platform)
    tokenizer = load_tokenizer(path)
    model = load(path, command.dtype, wafer, weights=command.weights)
    engine = Engine(
        model,
        tokenizer,
        wafer=wafer,
        max_streams=command.max_streams,
        max_waiting=command.max_waiting,
        kv_tokens=command.kv_tokens,
        chunk=command.chunk,
        lookup=command.lookup,
        folder=program_folder(),
    )
    text = ModelText(tokenizer, vocab=model.config.vocab, family=model.config.family)
    card = ModelCard(
        name=name,
        context=engine.max_tokens,
        tokenizer="bytes" if tokenizer.source == "bytes" else pathlib.Path(tokenizer.source).name,
        instruct_type=text.syntax.name if tokenizer.template else None,
        reasoning=text.reasons,
        tools=text.syntax.tools_in_template,
        quantization=command.weights,
    )
    made_of = f"{model.config} {tokenizer.fingerprint} {command.weights} {command.dtype}"
    fingerprint = f"fp_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    return Served(card=card, engine=engine, text=text, fingerprint=fingerprint)


def name_of(path: pathlib.Path) -> str:
    """The name of a checkpoint: of its folder, or of its file without the ending."""
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def program_folder() -> pathlib.Path:
    """Where compiled programs are kept: ~/.cache/wsekern/serving, or below $XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(home) / "wsekern" / "serving"


def read_keys(file: pathlib.Path | None) -> frozenset[str]:
    """The keys in a file, one a line; empty lines and those that begin with # do not count.

    Raises:
      ValueError: the file has no key.
      OSError: it cannot be read.
    """
    if file is None:
        return frozenset()
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"api_key_file={file} has no key; write one a line")
    return keys


def serve(command: ServeCommand) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit status."""
    models = OneModel(command)
    settings = Settings(keys=read_keys(command.api_key_file), log_prompts=command.log_prompts)
    server = HttpServer(build_app(models, settings), host=command.host, port=command.port)
    write_logs()
    print(f"listening on {server.url}, loading {models.cards[0].name}", flush=True)

    def load_and_tell() -> None:
        models.load()
        print(f"ready: {models.cards[0].name} at {server.url}/v1", flush=True)

    return server.run(load_and_tell)
