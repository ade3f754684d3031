"""Say why a command ends: one line on standard error that a terminal can show."""

import errno
import re
import sys

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but "\t" and "\n"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def print_error(command: str, error: Exception | str) -> None:
    """Prints `COMMAND: error: WHY` to standard error."""
    print(f"{command}: error: {error_line(error)}", file=sys.stderr)


def error_line(error: Exception | str) -> str:
    """What went wrong, in one line; of an error of the system, the file and the mend as well."""
    if not isinstance(error, OSError) or error.errno is None:
        return printable(str(error))
    text = f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
    if error.errno in _FULL:
        text += "; make room on that disk, or write to another"
    return printable(text)


def printable(text: str) -> str:
    r"""`text` with what is no letter, mark or space escaped, as in "\x1b[31m".

    Names and messages in a file may come from strangers. Raw, they could clear a terminal, write
    over the lines before them, or look like another line.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def without_controls(text: str) -> str:
    r"""The same for text of several lines, that a model wrote: lines and tabs stay, as do joiners.

    A model may say what a stranger has trained it to.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
