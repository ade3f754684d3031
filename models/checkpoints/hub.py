"""Find a checkpoint: a folder, a file, or a model in the Hugging Face cache or on its hub."""

import os
import pathlib
import re

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.*"]


def find(checkpoint: str | os.PathLike[str]) -> pathlib.Path:
    """The folder or file of a checkpoint; downloads a model that is only on the hub.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model; the local cache is tried first.

    Raises:
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
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
        f"{name}: no such folder, and not to be had from the Hugging Face hub: {last}"
    ) from last
