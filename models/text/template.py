"""This file is chat templates: Jinja that a checkpoint brings, run in a sandbox."""

import datetime
import json
from typing import Any


def render(template: str, names: dict[str, Any], source: str = "") -> str:
    """The text that a chat template makes of `names`, as `transformers` renders it.

    Args:
      template: in Jinja; it can neither change what it is given nor reach beyond it.
      names: what it may ask for: messages, tools, add_generation_prompt, bos_token and the like.
      source: where it comes from, for messages.

    Raises:
      ValueError: jinja2 is not installed, or the template is not valid or fails.
    """
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError('chat templates need jinja2: pip install "wsekern[hf]"') from None

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(**names)
    except Exception as error:  # a template may raise whatever Python does
        where = f" of {source}" if source else ""
        raise ValueError(f"the chat template{where} fails: {error}") from error


def _json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes what HTML would not take, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
