"""The model that a run starts from: a preset, or a checkpoint's sizes, weights and tokenizer."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from models.checkpoints.hub import find
from models.checkpoints.reading import open_checkpoint, read
from models.checkpoints.saving import check_savable
from models.config import DecoderConfig
from models.presets import find_preset
from models.text.reading import load_tokenizer
from models.text.tokenizer import Tokenizer
from training.config import TrainingConfig
from wsekern.wafer.wafer import Wafer

_CONTEXT = 1024  # tokens in a sequence; the longest that checkpoints allow needs far more memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialModel:
    """The model that a run starts from; make it with `find_initial_model`."""

    sizes: DecoderConfig
    context: int  # tokens in a sequence, unless the configuration says otherwise
    tokenizer: Tokenizer | None = None
    path: pathlib.Path | None = None  # the checkpoint's; None: a preset
    read_params: Callable[[Wafer], nnx.State] | None = None  # None: random parameters


def find_initial_model(config: TrainingConfig) -> InitialModel:
    """The preset or checkpoint that `config` names; reads no weights yet.

    Raises:
      ValueError: there is no such preset, or the checkpoint cannot be read, or what is trained from
        it could not be saved.
      FileNotFoundError: there is no such checkpoint.
    """
    if config.init is None:
        sizes = find_preset(config.preset)
        check_savable(sizes)
        return InitialModel(sizes=sizes, context=sizes.context)
    path = find(config.init)
    sizes, tensors = open_checkpoint(path)
    try:
        check_savable(sizes)
    except ValueError as error:
        raise ValueError(
            f"init={config.init!r}: what is trained from it could not be saved: {error}"
        ) from None
    tokenizer = load_tokenizer(path)
    tokenizer.check(sizes.vocab)

    def read_params(wafer: Wafer) -> nnx.State:
        return nnx.state(read(sizes, tensors, jnp.float32, wafer, progress=sys.stderr.isatty()))

    return InitialModel(
        sizes=sizes,
        context=min(sizes.context, _CONTEXT),
        tokenizer=tokenizer,
        path=path,
        read_params=read_params,
    )
