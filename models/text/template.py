"""Render a checkpoint's chat template: Jinja, run in a sandbox."""

import datetime
import json
from typing import Any


def render(template: str, names: dict[str, Any], source: str = "") -> str:
    """The text of a chat, rendered as `transformers` does.

    Args:
      template: Jinja; the sandbox lets it read `names`, but change nothing and reach nothing else.
      names: the template's variables: messages, tools, add_generation_prompt, bos_token, ...
      source: where the template is from, for error messages.

    Raises:
      ValueError: jinja2 is not installed, or the template is invalid or fails.
    """
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError(
            "chat templates need jinja2; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None

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
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
