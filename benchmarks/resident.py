"""Resident memory of a GGUF file that is served, by this project and by llama.cpp, on Linux.

Each is a process of its own that has answered one request, so that all is there that it needs.
"""

import asyncio
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TOKENS = 1024  # whose keys and values are kept
_PROMPT, _NEW = 32, 32
_LLAMA_CPP = """
import sys
from benchmarks.llama_cpp_text import greedy_together
streams, prompt, new = map(int, sys.argv[2:])
run = greedy_together(sys.argv[1], streams, prompt, new)  # named, or it would be freed
run([[1] * prompt] * streams)
print(open("/proc/self/status").read())
"""


def measure_server(file: pathlib.Path, weights: str, streams: int) -> tuple[int, int]:
    """Bytes in memory of `python -m serving`, at its first start, which compiles, and its second.

    Args:
      file: the GGUF file.
      weights: how they are kept, as `--weights` has it.
      streams: requests at once.
    """
    with tempfile.TemporaryDirectory() as cache:
        first, second = (_serve(file, weights, streams, cache) for _ in range(2))
    return first, second


def measure_llama_cpp(file: pathlib.Path, streams: int) -> int:
    """Bytes in memory of a Python that has cyllama read a file and continue some prompts.

    Args:
      file: the GGUF file.
      streams: prompts at once.
    """
    prompt = new = TOKENS // streams // 2
    command = [sys.executable, "-c", _LLAMA_CPP, str(file), str(streams), str(prompt), str(new)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return _resident(done.stdout)


def _serve(file: pathlib.Path, weights: str, streams: int, cache: str) -> int:
    command = [sys.executable, "-m", "serving", "--model", str(file), "--name", "model"]
    command += ["--weights", weights, "--kv-tokens", str(TOKENS), "--max-streams", str(streams)]
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    with subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if ready := re.match(r"ready: .* at (http\S+)/v1", line):
                    asyncio.run(_ask(ready[1]))
                    return _resident(pathlib.Path(f"/proc/{server.pid}/status").read_text())
        finally:
            server.terminate()
    raise RuntimeError(f"{' '.join(command)} ended before it was ready")


async def _ask(url: str) -> None:
    from serving.commands.http_client import HttpClient

    body = {"model": "model", "prompt": [1] * _PROMPT, "max_tokens": _NEW, "min_tokens": _NEW}
    async with HttpClient(url).post("/v1/completions", body) as response:
        await response.read()


def _resident(status: str) -> int:
    """VmRSS of a process, in bytes, from its status in /proc."""
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("the process's status has no VmRSS")
    return int(found[1]) * 1024
