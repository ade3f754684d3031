"""The command `python -m training`; imports jax only after the devices are prepared."""

from training.signals import KILLED, STOPPED, end_at_once

if __name__ == "__main__":
    end_at_once()  # before slow imports, which sometimes swallow a KeyboardInterrupt

import io  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

from training.config import parse  # noqa: E402
from wsekern.closed_pipe import end_on_closed_pipe  # noqa: E402
from wsekern.error_line import print_error  # noqa: E402
from wsekern.wafer.launch import keep_compiled_programs, prepare_devices  # noqa: E402

if TYPE_CHECKING:
    from training.loop import RunResult

_COMMAND = "python -m training"


def main(argv: list[str] | None = None) -> int:
    """Trains as `argv` says, and returns an exit status.

    0: done. 1: the loss diverged, the run folder was removed, or the last step or the model could
    not be saved. 2: the configuration was refused. 75: stopped by a signal, and --resume goes on.
    With --compile-only: 0 if the step fits the chips, 1 if not.
    130, 143: stopped by Ctrl-C or SIGTERM before anything was saved.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a model may write more characters than the terminal has
    with end_on_closed_pipe():  # of `--help | head`
        config = parse(argv)
    if __name__ == "__main__":
        end_at_once(config.run_dir)
    try:
        if config.compile_only:
            prepare_devices(1, "cpu")
            from training.compile_only import compile_step

            return compile_step(config)
        prepare_devices(config.devices, config.platform, needed_by=f"wafer={config.wafer!r}")
        from training.loop import Diverged
        from training.run_folder import RunFolderGone
        from training.trainer import Trainer

        keep_compiled_programs()
        try:
            result = Trainer(config).fit()
        except (Diverged, RunFolderGone) as error:
            print_error(_COMMAND, error)
            return 1
    except (ValueError, OSError, ImportError) as error:
        print_error(_COMMAND, error)
        return 2
    except KeyboardInterrupt:
        return KILLED
    try:
        sys.stdout.flush()
    except OSError:  # lost output is no failure of the run; the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not result.saved:
        print_error(_COMMAND, f"{_what_is_lost(result)}; the lines above say why")
        return 1
    return STOPPED if result.stopped else 0


def _what_is_lost(result: "RunResult") -> str:
    """What could not be saved, and what --resume does about it."""
    if result.resumes_from == result.step:
        return f"step {result.step} is saved, but not the model made of it; --resume tries again"
    from_there = (
        "no step is saved: --resume starts with the first"
        if result.resumes_from is None
        else f"--resume goes on from step {result.resumes_from}"
    )
    return f"step {result.step} could not be saved; {from_there}"


if __name__ == "__main__":
    status = main()
    if status == STOPPED:  # all is saved; taking jax down may take seconds more
        os._exit(status)
    sys.exit(status)
