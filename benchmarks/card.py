"""Everything that a real card must show, in one command that stops in time: right, then fast.

In this order: every public operation, forward and gradient, against float32 on the host; products
and attention against the vendor's libraries called directly; a training step against plain Flax;
text generation against transformers; stencils against whole arrays in plain jnp. Rates are given
as shares of the data sheet's peak, or of what a large product and a large copy reach here.

    python -m benchmarks card --minutes 8 --out results   on a GPU or TPU
    python -m benchmarks card --platform cpu --small      tries the program itself, in two

`results/card.json` has every row, and is written again after each; `results/card.md` and the
output's end have the table. A section may take a share of the time, what it leaves goes to the
next. A measurement that would not end in time is not begun; the table names it. Ctrl-C, SIGTERM
and the end of the time write what there is. Status 1: something was wrong or raised.

What must be there: a checkout, and a Python with jax 0.10 or newer, the plugin of the card, numpy,
scipy, rich and jaxtyping; optax and flax for training and text; torch and transformers for the peer
of text. What is missing is named in the table, and the rest is measured. Neither tyro nor
matplotlib is needed. To a machine without a network that has jax and its plugin alone, carry these
4 MB of wheels (here for Python 3.12 on x86-64):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 flax optax rich jaxtyping absl-py etils msgpack treescope \
        pyyaml markdown-it-py mdurl pygments wadler-lindig typing_extensions
    pip install --no-index --no-deps --target card-site .whl/*.whl  # there
    PYTHONPATH=card-site python -m benchmarks card --minutes 8 --out results
"""

# argparse, not tyro as in the other benchmarks: one package less to carry to a card.
import argparse
import difflib
import importlib
import math
import os
import pathlib
import time

from benchmarks import harness
from benchmarks.on_card.session import Session, failure
from wsekern.wafer.launch import find_devices, prepare_devices

# Section (a module of benchmarks.on_card) -> its share of the time; the next gets what one leaves.
SECTIONS = {
    "correctness": 0.28,
    "products": 0.10,
    "attention": 0.14,
    "training": 0.26,
    "generation": 0.14,
    "stencils": 0.08,
}
_CEILINGS_SHARE = 0.05
_MOST_MINUTES = 24 * 60


def main(argv: list[str] | None = None) -> None:
    """Runs the sections with the flags in `argv`.

    Raises:
      SystemExit: with status 1 once everything was tried, if a check failed or something raised;
        with status 2 if a flag is wrong.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    begun = time.monotonic()  # starting jax and the card takes seconds too
    try:
        _start(options.platform)
        options.out.mkdir(parents=True, exist_ok=True)
        session = Session(options.out, options.minutes, small=options.small, begun=begun)
        session.write("nothing was tried yet")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with session.ending_in_time():
        run(session, options.only)
        session.finish()
    if any(row.status in ("failed", "error") for row in session.rows):
        raise SystemExit(1)


def run(session: Session, sections: list[str]) -> None:
    """Measures the ceilings, then runs each section until its share of the time is over."""
    session.environment = harness.environment()
    session.not_begun = list(sections)
    whole = sum(SECTIONS[name] for name in sections)
    share = _CEILINGS_SHARE
    _run_section(session, "ceilings", share)
    for name in sections:
        share += (1 - _CEILINGS_SHARE) * SECTIONS[name] / whole
        _run_section(session, name, share)


def _run_section(session: Session, name: str, share: float) -> None:
    session.begin(name, share)
    try:
        module = importlib.import_module(f"benchmarks.on_card.{name}")
        module.run(session)
    except Exception as error:  # the other sections run all the same
        session.add(failure("the section", error))


def _start(platform: str | None) -> None:
    """Starts jax on a platform, with the CPU beside it for the references.

    Raises:
      ValueError: the platform is not to be had, or there is nothing but a CPU and none was named.
    """
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # so that compile times are true
    prepare_devices(1, platform)  # type: ignore[arg-type]
    named = os.environ.get("JAX_PLATFORMS", "")
    if named and "cpu" not in named.split(","):
        os.environ["JAX_PLATFORMS"] = f"{named},cpu"
    devices = find_devices(platform)  # type: ignore[arg-type]
    if platform is None and devices[0].platform == "cpu":
        raise ValueError(
            "jax finds no GPU or TPU here; install the jax of your card, or try the program itself "
            "with --platform cpu --small"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=8.0, help="how long all may take (default: 8)"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/card"),
        metavar="FOLDER",
        help="where card.json and card.md go (default: runs/card)",
    )
    parser.add_argument(
        "--only",
        type=_sections,
        default=list(SECTIONS),
        metavar="SECTION,...",
        help=f"run only these of {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="by default jax's choice, not a CPU"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program")
    return parser


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= _MOST_MINUTES:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number of minutes above 0, at most {_MOST_MINUTES:,}"
        )
    return minutes


def _sections(text: str) -> list[str]:
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SECTIONS)}{hint}")
    return [name for name in SECTIONS if name in named]
