"""What `import models` gives, and where its old modules went."""

import ast
import inspect
import subprocess
import sys

import pytest

import models


def test_every_public_name_is_the_one_that_type_checkers_see():
    tree = ast.parse(inspect.getsource(models))
    for_types = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: node.module
        for node in for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == models.__all__ == dir(models)
    for name, module in homes.items():
        assert getattr(models, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="module 'models' has no attribute 'lod'"):
        _ = models.lod


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("models.llama", "models.families.llama"),
        ("models.running", "models.commands"),
        ("models.command", "models.arguments"),
        ("models.checkpoints.fields", "models.checkpoints.config_json"),
    ],
)
def test_an_old_module_names_its_new_place_when_models_alone_is_imported(old, new):
    program = f"import sys, models\nassert 'jax' not in sys.modules\nimport {old}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"ImportError: {old} has moved: import {new}\n" in run.stderr


def test_presets_are_listed_by_name():
    names = models.list_presets()
    assert {"nano", "gpt2-124m", "llama3-8b", "gpt-oss-20b"} < set(names)
    assert all(models.find_preset(name).layers for name in names)
