"""Each command on a page, in a docstring or in a help text runs to its end.

Commands run in this process, on small stand-ins for what a user brings. A command that would train,
draw or time for minutes gets flags that make it small; the last of a repeated flag counts.
"""

import ast
import contextlib
import importlib
import io
import json
import pathlib
import re
import shlex
import shutil
import sys

import jax
import pytest
import tokenizers
from tiny_checkpoints import CONFIGS, make

from benchmarks.example import example
from wsekern import cli
from wsekern.estimator.validation import points

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    file
    for folder in ("wsekern", "sharding", "models", "training", "serving", "benchmarks", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
PROGRAMS = [f"python -m {name}" for name in ("training", "models", "serving", "benchmarks")]
PROGRAMS += ["python examples/", "wsekern estimate", "wsekern info", "wsekern bench"]
PROGRAMS += ["wsekern compile"]
START = f"(?:{'|'.join(PROGRAMS)})"
IN_LINE = re.compile(rf"`({START}[^`]*)`")
AFTER_PROMPT = re.compile(r"^\$ (.*)$", re.MULTILINE)
INDENTED = re.compile(rf"^ {{4,}}({START}.*)$", re.MULTILINE)

# What makes a command small, by its beginning; the longest that fits is taken.
SMALL = {
    "python -m training": "--steps 2 --batch 2 --context 16 --eval-batches 1 --sample-tokens 2"
    " --checkpoint-minutes 0 --platform cpu --out runs/small",
    "python -m training --preset 125m": "--preset nano --steps 2 --batch 2 --context 16"
    " --eval-batches 1 --sample-tokens 2 --platform cpu --out runs/small",
    "python -m training --preset 1b": "--preset nano --wafer 2x2x2 --steps 2 --batch 4 --context 16"
    " --eval-batches 1 --sample-tokens 2 --platform cpu --out runs/small",
    "python -m training --preset 20m": "--preset nano --steps 2 --batch 4 --context 16"
    " --eval-batches 1 --sample-tokens 2 --platform cpu --out runs/small",
    "python -m training --preset nano --wafer 40x40": "--wafer 2x2 --steps 2 --batch 4 --context 16"
    " --eval-batches 1 --sample-tokens 2 --platform cpu --out runs/small",
    "python -m models generate": "--max-new-tokens 2",
    "python examples/heat.py": "--cells 32 --steps 6",
    "python examples/heat.py --estimate": "",
    "python examples/poisson.py": "--cells 16",
    "python examples/poisson.py --estimate": "64x64 --cells 128",
    "python examples/shallow_water.py": "--height 16 --length 16 --days 1 --frames 2",
    "python examples/shallow_water.py --estimate": "",
    "python examples/wave.py": "--cells 32 --steps 2",
    "python examples/wave.py --estimate": "",
    "python -m benchmarks attention": "--grid 2x1 --lengths 64 --heads 2 --rounds 1",
    "python -m benchmarks bicgstab": "--grid 4 4 --depth 8",
    "python -m benchmarks collectives": "--pes 4 --words 16 --grid 2x1 --rounds 1",
    "python -m benchmarks experts": "--tokens 32 --d-model 32 --d-ff 32 --experts 8 --chosen 2"
    " --rounds 1",
    "python -m benchmarks generate": "--sizes 42m --batch 1 --prompt 4 --new 4 --rounds 1",
    "python -m benchmarks load": "--size 3m --grid 1x2 --rounds 1",
    "python -m benchmarks marks": "--only rms_norm --dtypes bfloat16",
    "python -m benchmarks compiled": "--only decode --lengths 256 --target v5e:2x2",
    "python -m training --compile-only": "--target v5e:2x2 --preset nano --batch 4 --context 32",
    "python -m benchmarks matmul": "--grid 2x2 --sizes 64 --rounds 1",
    "python -m benchmarks overhead": "--rounds 1",
    "python -m benchmarks reliability": "--names none",
    "python -m benchmarks serve": "--parts together --streams 1 --prompt 8 --new 4 --rounds 1",
    "python -m benchmarks shallow_water": "--cells 24 32 --grids 1x1 2x1 --steps 4 --rounds 1"
    " --days 0.01",
    "python -m benchmarks solvers": "--grid 2x1 --size 32 --rounds 1",
    "python -m benchmarks spread": "--side 4 --matrix 16 --heat 8 8 4 --steps 2 --rounds 1",
    "python -m benchmarks stencil": "--grid 2x1 --stencils 5-point --size 64 --steps 4 --depths 1"
    " --rounds 1",
    "python -m benchmarks traffic": "--sides 2",
    "python -m benchmarks train_step": "--sizes nano --grid 1x2 --rounds 1",
    "python -m benchmarks quantized": "--sizes nano --rows 2 --rounds 1",
    "python -m benchmarks wave_gradient": "--size 32 --steps 20 --kept 5 --rounds 1",
    "python -m benchmarks whole_wafer": "--side 8 --matrix 16 --vector 16 --heat 8 8 4 --steps 2"
    " --rounds 1",
}
# What no test can run, with the reason.
NOT_RUN = {
    "make": "CI runs what it names",
    "pip install": "it would change the environment that the tests run in",
    "python -m benchmarks card": "tests/benchmarks/test_card.py does, on a clock of its own",
    "python -m models convert": "tests/models/checkpoints/test_gguf.py does, with a GGUF file",
    "python -m serving": "it serves until it is told to end; tests/serving/test_program.py runs it",
    "python -m serving bench": "it needs a server; tests/serving/commands/bench runs it",
    "python -m serving chat": "it reads lines; tests/serving/commands/chat runs it",
    "python -m serving soak": "it loads a server for minutes; tests/serving/commands/soak runs it",
    "python examples/serve.py": "it downloads a model; tests/examples/test_serve.py runs it",
    "python examples/smollm2.py": "it downloads a model; tests/models/checkpoints has a test of it",
}
# What compiles for chips that are not there, by the compiler of TPUs.
COMPILES = ("--compile-only", "wsekern compile", "benchmarks compiled", "benchmarks marks")
# Names of commands, as a page speaks of them; the same words as command lines print help.
NAMES = {"python -m training", "python -m models", "python -m models plan", "wsekern estimate"}
NAMES |= {"wsekern compile"}
NAMES |= {"python -m benchmarks NAME", "python -m benchmarks NAME --help"}
NAMES |= {"wsekern bench NAME --help", "python -m models info --model NAME"}
TEXT = "The quick brown fox jumps over the lazy dog, and runs.\n" * 200
PROGRAM = """
import jax, jax.numpy as jnp, wsekern as wk
SHAPES = [jax.ShapeDtypeStruct((64, 64), jnp.float16)] * 2
FUNCTION = wk.matmul
"""


def commands_of(text: str) -> list[str]:
    found = [" ".join(command.split()) for command in IN_LINE.findall(text)]
    # A comment begins at "#" on a page, and after two spaces in a docstring.
    lines = [*AFTER_PROMPT.findall(text), *INDENTED.findall(text)]
    return found + [re.split(r"\s+#\s|\s{2,}", line)[0].strip() for line in lines]


def strings_of(file: pathlib.Path) -> list[str]:
    """The docstrings, help texts and messages of a source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def all_commands() -> list[str]:
    """Every command but those that another one only adds flags to."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [text for file in SOURCES for text in strings_of(file)]
    found = {command for text in texts for command in commands_of(text)} - NAMES
    return sorted(c for c in found if not any(other.startswith(f"{c} --") for other in found))


COMMANDS = all_commands()


def starts(command: str, table: dict[str, str]) -> list[str]:
    return sorted((start for start in table if command.startswith(start)), key=len)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: a text, notes, a checkpoint, a program, points."""
    place = tmp_path_factory.mktemp("place")
    (place / "notes").mkdir()
    for name in ("notes/a.txt", "notes/b.txt", "tinyshakespeare.txt"):
        (place / name).write_text(TEXT)
    make(place / "FOLDER", CONFIGS["llama3"] | {"vocab_size": 256})
    save_byte_tokenizer(place / "FOLDER")
    shutil.copytree(place / "FOLDER", place / "FOLDER_OR_GGUF")
    (place / "FILE.py").write_text(PROGRAM)
    shutil.copy(points.POINTS, place / "POINTS.csv")
    shutil.copytree(ROOT / "examples", place / "examples")
    return place


def save_byte_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of 256 bytes with the plainest chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def main_of(words: list[str]):
    """The function that runs a command line, and the flags that it is called with."""
    if words[0] == "wsekern":
        return lambda flags: cli.main(flags), words[1:]
    if words[1] == "-m":
        return importlib.import_module(f"{words[2]}.__main__").main, words[3:]
    module = example(pathlib.Path(words[1]).stem)

    def run(flags):
        sys.argv = [words[1], *flags]
        getattr(module, "run", lambda main: main())(module.main)

    return run, words[2:]


def marked(command):
    marks = [pytest.mark.tpu] if any(words in command for words in COMPILES) else []
    return pytest.param(command, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("command", [marked(c) for c in COMMANDS if not starts(c, NOT_RUN)])
def test_it_runs_to_its_end(command, place, monkeypatch, quick_collection):
    monkeypatch.chdir(place)
    monkeypatch.setenv("WSEKERN_CACHE", str(place / "cache"))
    monkeypatch.setattr(sys, "argv", ["command"])
    # `wsekern bench` runs the module as a script, which must not be imported yet.
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)
    shutil.rmtree(place / "runs", ignore_errors=True)
    small = starts(command, SMALL)
    line = f"{command} {SMALL[small[-1]] if small else ''}"
    run, flags = main_of(shlex.split(line))
    output = io.StringIO()
    # Benchmarks run with the settings of a user.
    with contextlib.redirect_stdout(output), jax.numpy_rank_promotion("allow"):
        try:
            status = run(flags)
        except SystemExit as end:  # as after `--help`
            status = end.code
    assert status in (None, 0), output.getvalue()
    assert output.getvalue() or "--out" in command


def test_what_is_said_of_commands_is_said_of_one():
    for table in (SMALL, NOT_RUN):
        unused = [start for start in table if not any(c.startswith(start) for c in COMMANDS)]
        assert not unused
