"""List a dataclass's fields in the reference, with the comments at the ends of their lines.

mkdocstrings shows docstrings alone and would leave out `cycles: float  # until all is done`.
"""

import functools
import io
import pathlib
import tokenize
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Appends to a class's docstring an "Attributes:" section made of its fields' comments."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if not cls.docstring or any(
            title in cls.docstring.value for title in ("Args:\n", "Attributes:\n")
        ):
            return
        comments = _line_comments(pathlib.Path(str(cls.filepath)))
        fields = [
            member
            for name, member in cls.members.items()
            if isinstance(member, griffe.Attribute)
            and member.annotation is not None
            and "property" not in member.labels
            and not name.startswith("_")
        ]
        # Fields that have docstrings are shown by themselves.
        if not any(f.endlineno in comments for f in fields) or any(f.docstring for f in fields):
            return
        rows = [f"  {f.name}: {comments[f.endlineno]}" for f in fields if f.endlineno in comments]
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(rows)


@functools.cache
def _line_comments(path: pathlib.Path) -> dict[int, str]:
    """The comments of a file that stand after code, by their lines' numbers."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#")
    }
