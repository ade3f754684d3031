"""The clients on docs/serving.md get their answers, as they stand there."""

import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(py|sh)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
CLIENTS = BLOCK.findall(PAGE)


def test_the_page_has_a_client_of_each_kind():
    assert [kind for kind, _ in CLIENTS] == ["py", "py", "sh"]


@pytest.mark.parametrize(("kind", "code"), CLIENTS, ids=["openai", "cerebras", "curl"])
def test_a_client_prints_the_answer(server, kind, code, capsys):
    code = code.replace("http://127.0.0.1:8000", server.url)
    code = code.replace("SmolLM2-135M-Instruct", "scripted")
    if kind == "py":
        names: dict[str, Any] = {}
        exec(code, names)
        names["client"].close()
        printed = capsys.readouterr().out
    elif shutil.which("curl") is None:
        pytest.skip("there is no curl")
    else:
        printed = subprocess.run(
            ["sh", "-c", code], capture_output=True, text=True, check=True
        ).stdout
    assert "Hello there, how are you?" in printed
