"""This file is where a checkpoint is: a folder, a file, or in the Hugging Face cache or hub."""

import os
import pathlib
import re

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.*"]


def find(checkpoint: str | os.PathLike) -> pathlib.Path:
    """The folder or file of a checkpoint; one that is only on the hub is downloaded.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model: the local cache is asked first.

    Raises:
      FileNotFoundError: there is no such folder or file, and no such model.
    """
    path = pathlib.Path(checkpoint)
    if path.exists():
        return path
    name = str(checkpoint)
    if not _ID.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"{path}: no such folder or file")
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such folder; to look for it on the Hugging Face hub, install "
            "huggingface_hub (the extra `hf`)"
        ) from None
    for local in (True, False):
        try:
            return pathlib.Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=_WANTED, local_files_only=local
                )
            )
        except Exception as error:  # the hub's own errors share no class that says "not there"
            last = error
    raise FileNotFoundError(
        f"{name}: no such folder, and not to be had from the Hugging Face hub: {last}"
    ) from last
