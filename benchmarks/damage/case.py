"""One case of `python -m benchmarks reliability`."""

import dataclasses
import pathlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that goes wrong on purpose, and the check that the project does the right thing.

    Attributes:
      kind: The row of the table that the case counts in, such as "bit flips".
      name: Tells the case from others of its kind; with the seed it can be run again by it.
      check: Called with an empty folder of its own. Raises AssertionError, which says what went
        wrong; any other exception counts as wrong too.
    """

    kind: str
    name: str
    check: Callable[[pathlib.Path], None]
