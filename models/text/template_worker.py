"""Render chat templates in a process of its own, under limits that the kernel keeps.

`models.text.template` runs `main` as a program, and says what is limited, and how both talk. What
this file imports is loaded each time the program starts: the standard library, and jinja2.
"""

import datetime
import functools
import json
import marshal
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from models.text.template import ERROR, HEADER, LAST_ERROR, MEMORY, OUTPUT, SECONDS, TEXT

_MESSAGE = 500  # characters of an error message


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which marks for training what the assistant said, and changes no text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, as in transformers: what is set in it is not seen after it.
        call = self.call_method("_text", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, which also refuses names of Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args  # as in jinja2: a value may be called `self`
        fields = dict(*rest, **values)
        for name in fields:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """`dict` for templates: makes dicts, and shows nothing of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Templates read what they are given, change nothing, and reach nothing else."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja's own result would be an empty text where it is merely printed.
        raise jinja2.sandbox.SecurityError(
            f"attribute {attribute!r} of {type(obj).__name__!r} is not for templates"
        )


def environment() -> jinja2.Environment:
    """Jinja with the tags, filters and functions that `transformers` gives chat templates."""
    made = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(template: jinja2.Template, names: dict[str, Any]) -> str:
    """The text of a chat.

    Raises:
      ValueError: it is longer than `OUTPUT` characters.
      Exception: whatever else the template raises.
    """
    pieces: list[str] = []
    length = 0
    for piece in template.generate(names):
        length += len(piece)
        if length > OUTPUT:
            raise ValueError(f"its text has more than {OUTPUT:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are none, or until its memory is used up."""
    jinja = environment()
    compiled = functools.lru_cache(maxsize=16)(jinja.from_string)
    _limit_resources()
    while len(header := requests.read(HEADER.size)) == HEADER.size:
        _, size = HEADER.unpack(header)
        # The kernel ends the process when its time is up, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            template, names = marshal.loads(requests.read(size))
            letter, text = TEXT, render(compiled(template), names)
            content = text.encode(errors="surrogatepass")
        except MemoryError:
            letter, content = LAST_ERROR, f"it takes more than {MEMORY >> 20} MB".encode()
        except Exception as error:  # a template may raise whatever Python does
            message = f"{error or type(error).__name__}"[:_MESSAGE]
            if "set_int_max_str_digits" in message:  # which a template cannot call
                message = "a number has too many digits to be written"
            letter, content = ERROR, message.encode(errors="surrogatepass")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(HEADER.pack(letter, len(content)) + content)
        answers.flush()
        if letter == LAST_ERROR:
            return


def _limit_resources() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {
        resource.RLIMIT_AS: _memory() + MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    for limit, value in limits.items():
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # macOS knows no limit of the address space
            pass


def _memory() -> int:
    """Bytes of the address space in use; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    """Answers the requests on standard input, on standard output."""
    serve(sys.stdin.buffer, sys.stdout.buffer)
