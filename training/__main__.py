"""This file is the command `python -m training`; it imports jax only once the devices are made."""

import sys

from training.config import parse
from training.launch import prepare
from training.signals import KILLED, STOPPED


def main(argv: list[str] | None = None) -> int:
    """Trains as `argv` says; an exit status: 0; 1 diverged or unsaved; 2 refused; 75; 130."""
    config = parse(argv)
    try:
        prepare(config)
        from training.trainer import Diverged, Trainer

        try:
            result = Trainer(config).fit()
        except Diverged as error:
            return _say(error, 1)
    except (ValueError, OSError) as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return KILLED
    if not result.saved:
        return _say("the last step could not be saved; the lines above say why", 1)
    return STOPPED if result.stopped else 0


def _say(error: object, status: int) -> int:
    print(f"python -m training: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
