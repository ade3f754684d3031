"""What `import training` gives, and where its old modules went."""

import ast
import inspect
import subprocess
import sys

import pytest

import training


def test_every_public_name_is_the_one_that_type_checkers_see():
    tree = ast.parse(inspect.getsource(training))
    for_types = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: node.module
        for node in for_types.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == training.__all__ == dir(training)
    for name, module in homes.items():
        assert getattr(training, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="module 'training' has no attribute 'Trainr'"):
        _ = training.Trainr


def test_the_configuration_needs_no_jax():
    program = "import sys\nfrom training import TrainingConfig\nassert 'jax' not in sys.modules\n"
    program += "from training import Trainer\nassert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training.launch", "wsekern.wafer.launch"),
        ("training.optimiser", "training.optimizer"),
        ("training.run", "training.loop"),
        ("training.start", "training.initial_model"),
    ],
)
def test_an_old_module_names_its_new_place(old, new):
    run = subprocess.run([sys.executable, "-c", f"import {old}"], capture_output=True, text=True)
    assert f"ImportError: {old} has moved: import {new}\n" in run.stderr
