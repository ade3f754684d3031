"""Code on the pages prints what they show, links lead somewhere, every public name has a page."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import models
import serving
import sharding
import training
import wsekern
from wsekern import fabric

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def marked(page):
    blocks = "".join(code for code, _ in CODE.findall(page.read_text()))
    marks = [pytest.mark.tpu] if "Wafer.topology(" in blocks else []
    return pytest.param(page, id=page.name, marks=marks)


@pytest.mark.parametrize("page", [marked(p) for p in PAGES if "```python" in p.read_text()])
def test_the_code_of_a_page_prints_what_the_page_shows(page):
    blocks = CODE.findall(page.read_text())
    script = "\n".join(code for code, _ in blocks)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "".join(output for _, output in blocks)
    assert run.stdout


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_what_a_page_links_to_exists(page):
    targets = [t for t in LINK.findall(page.read_text()) if "://" not in t]
    assert not [t for t in targets if not (page.parent / t).exists()]


@pytest.mark.parametrize(
    "package", [wsekern, fabric, sharding, models, training, serving], ids=lambda p: p.__name__
)
def test_the_reference_lists_every_public_name(package):
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = {name for page in pages for name in REFERENCE.findall(page.read_text())}
    public = [getattr(package, name) for name in package.__all__]
    for thing in public:
        if inspect.isclass(thing) or inspect.isroutine(thing):
            # A page lists a thing itself, or the whole module that defines it.
            places = {thing.__module__, f"{thing.__module__}.{thing.__qualname__}"}
            assert places & listed, f"{thing.__qualname__} is on no page of docs/api"
