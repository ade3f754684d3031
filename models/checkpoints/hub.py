"""Find a checkpoint: a folder, a file, or a model in the Hugging Face cache or on its hub."""

import os
import pathlib
import re

from models.checkpoints.json_file import file_size

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.*"]


def find(checkpoint: str | os.PathLike[str]) -> pathlib.Path:
    """The folder or file of a checkpoint; downloads a model that is only on the hub.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model; the local cache is tried first.

    Raises:
      ValueError: it is a FIFO, a device or the like, or a link that leads nowhere.
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
    """
    path = pathlib.Path(checkpoint)
    if path.exists() or path.is_symlink():
        return path if path.is_dir() else _regular(path)
    name = str(checkpoint)
    if not _ID.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"{path}: no such folder or file")
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such folder; the Hugging Face hub needs huggingface_hub; in the checkout, "
            "run `pip install -e '.[hf]' -c constraints.txt`"
        ) from None
    for local in (True, False):
        try:
            return pathlib.Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=_WANTED, local_files_only=local
                )
            )
        except Exception as error:  # the hub's errors for "not there" share no class
            last = error
    raise FileNotFoundError(
        f"{name}: no such folder, and not to be had from the Hugging Face hub: "
        + " ".join(str(last).split())
    ) from last


def _regular(path: pathlib.Path) -> pathlib.Path:
    file_size(path)  # refuses what is no regular file, and a link to none
    return path
