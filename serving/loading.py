"""Load checkpoints into engines that serve them."""

import dataclasses
import hashlib
import os
import pathlib
import time
import urllib.parse

import jax

from models.checkpoints.hub import find
from models.checkpoints.reading import default_dtype, load, open_checkpoint, read_config
from models.decoder import Decoder
from models.text.reading import load_tokenizer
from models.text.tokenizer import Tokenizer
from serving.api.app import build_app
from serving.api.logs import write_logs
from serving.api.registry import ModelCard, Served
from serving.api.server import HttpServer
from serving.arguments import ModelCommand, ModelOptions, ServeCommand
from serving.engine import Engine, find_max_tokens
from serving.equality import find_order
from serving.models_by_name import ModelsByName, ModelSource
from serving.prompt_cache import PromptCache
from serving.text.model_text import ModelText
from wsekern.wafer.launch import find_devices, make_wafer
from wsekern.wafer.wafer import Wafer

_MOST_APART = 16  # layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model of the command: where it is, and what of it is known without its weights.

    Args:
      path: the folder or file.
      name: what clients call it.
      options: how it is kept and run.
      wafer: where it goes; None: one device.
      max_tokens: of a prompt and its text together.
      prompt_folder: where prompts that were read are kept; None: nowhere.
      prompt_bytes: of this model's file there, at most.
      created: when the server first knew it, in seconds since 1970.
    """

    path: pathlib.Path
    name: str
    options: ModelOptions
    wafer: Wafer | None
    max_tokens: int
    prompt_folder: pathlib.Path | None = None
    prompt_bytes: int = 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @classmethod
    def find(
        cls,
        command: ModelCommand,
        wafer: Wafer | None = None,
        *,
        prompt_folder: pathlib.Path | None = None,
        prompt_bytes: int = 0,
    ) -> "Checkpoint":
        """Finds a model and reads its config.

        Raises:
          ValueError: it is no checkpoint of a known family.
          FileNotFoundError: there is no such checkpoint.
        """
        path, options = find(command.model), command.options
        config, tensors = open_checkpoint(path)
        max_tokens = find_max_tokens(
            config,
            options.kv_dtype or options.dtype or default_dtype(config, tensors),
            wafer,
            max_streams=options.max_streams,
            kv_tokens=options.kv_tokens,
        )
        name = command.name or name_of(path)
        return cls(
            path=path,
            name=name,
            options=options,
            wafer=wafer,
            max_tokens=max_tokens,
            prompt_folder=prompt_folder,
            prompt_bytes=prompt_bytes,
        )

    def source(self) -> ModelSource:
        """What the server needs to load it."""
        return ModelSource(
            card=ModelCard(name=self.name, context=self.max_tokens, created=self.created),
            at_start=self.options.load == "start",
            describe=self.describe,
            load=self.load,
        )

    def describe(self) -> ModelCard:
        """The model's card; reads config and tokenizer, and no weights.

        Raises:
          ValueError: a file is not as it should be.
        """
        config = read_config(self.path)
        tokenizer = load_tokenizer(self.path)
        tokenizer.check(config.vocab)
        return self._card(ModelText(tokenizer, vocab=config.vocab, family=config.family))

    def load(self) -> Served:
        """The model with its engine.

        Raises:
          ValueError: it does not load; says why.
        """
        options = self.options
        tokenizer = load_tokenizer(self.path)
        draft = self._load_draft(tokenizer)
        model = load_model(self.path, options, self.wafer)
        engine = Engine(
            model,
            tokenizer,
            wafer=self.wafer,
            max_streams=options.max_streams,
            max_waiting=options.max_waiting,
            kv_tokens=options.kv_tokens,
            kv_dtype=options.kv_dtype,
            chunk=options.chunk,
            lookup=options.lookup,
            draft=draft,
            folder=program_folder(),
            prompt_cache=self._prompt_cache(tokenizer),
        )
        text = ModelText(tokenizer, vocab=model.config.vocab, family=model.config.family)
        made_of = f"{model.config} {tokenizer.fingerprint} {options.weights} {options.dtype}"
        made_of += f" {options.kv_dtype} {options.activations}"
        fingerprint = f"fp_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
        return Served(card=self._card(text), engine=engine, text=text, fingerprint=fingerprint)

    def _load_draft(self, tokenizer: Tokenizer) -> Decoder | None:
        options = self.options
        if options.draft is None:
            return None
        path = find(options.draft)
        if load_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"draft={options.draft}: its tokenizer is not that of {self.path}; take a smaller "
                "model of the same family"
            )
        return load(path, options.dtype, self.wafer)

    def _prompt_cache(self, tokenizer: Tokenizer) -> PromptCache | None:
        if self.prompt_folder is None:
            return None
        # Quoted, a name of any characters names a file in this folder.
        file = self.prompt_folder / f"{urllib.parse.quote(self.name, safe='')}.safetensors"
        return PromptCache(file=file, most_bytes=self.prompt_bytes, made_by=tokenizer.fingerprint)

    def _card(self, text: ModelText) -> ModelCard:
        source = text.tokenizer.source
        return ModelCard(
            name=self.name,
            context=self.max_tokens,
            created=self.created,
            tokenizer="bytes" if source == "bytes" else pathlib.Path(source).name,
            instruct_type=text.syntax.name if text.tokenizer.template else None,
            reasoning=text.reasons,
            tools=text.syntax.tools_in_template,
            quantization=self.options.weights,
        )


def load_model(path: pathlib.Path, options: ModelOptions, wafer: Wafer | None) -> Decoder:
    """A checkpoint's model, its weights as an engine reads them fastest.

    On a CPU a scan copies the weights of every layer before it reads them. So the few layers of a
    small model lie apart; of many, the programs would take too much memory.

    Raises:
      ValueError: it does not load; says why.
    """
    config, tensors = open_checkpoint(path)
    on_cpu, order = wafer is None and jax.default_backend() == "cpu", None
    if on_cpu and options.weights is None:
        order = find_order(config, options.dtype or default_dtype(config, tensors))
    # What a product widens is copied in any case.
    widens = options.weights is not None and options.activations is None
    return load(
        path,
        options.dtype,
        wafer,
        weights=options.weights,
        activations=options.activations,
        order=order,
        stacked=not on_cpu or widens or config.layers > _MOST_APART,
    )


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
    wafer = None
    if command.wafer is None:
        find_devices(command.platform)  # refuses a platform that is not there
    else:
        wafer = make_wafer(command.wafer, command.platform)
    if command.prompt_cache is not None:  # what is in it, nobody else should read
        command.prompt_cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    checkpoints = [
        Checkpoint.find(
            model,
            wafer,
            prompt_folder=command.prompt_cache,
            prompt_bytes=command.prompt_cache_mb * 1_000_000,
        )
        for model in command.models
    ]
    keys = read_keys(command.api_key_file)
    models = ModelsByName(
        [checkpoint.source() for checkpoint in checkpoints],
        max_loaded=command.max_loaded,
        idle_seconds=None if command.idle_minutes is None else 60 * command.idle_minutes,
    )
    app = build_app(models, command.http, keys=keys)
    server = HttpServer(app, host=command.host, port=command.port)
    write_logs()
    names = ", ".join(card.name for card in models.cards)
    print(f"listening on {server.url}, loading {names}", flush=True)

    def load_and_tell() -> None:
        models.load()
        print(f"ready: {names} at {server.url}/v1", flush=True)

    return server.run(load_and_tell)
