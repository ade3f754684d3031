"""Old paths of modules and names: what an import of one says."""

import importlib
import subprocess
import sys

import pytest

import wsekern.moved


@pytest.mark.parametrize("old", wsekern.moved.MOVED)
def test_an_old_path_names_a_new_one_that_can_be_imported(old):
    new = wsekern.moved.MOVED[old]
    # Python imports the folder first: the error of a folder that has moved names its modules too.
    folder = old.rpartition(".")[0]
    inside = folder in wsekern.moved.MOVED
    message = f"; {old} is now {new}(;|$)" if inside else f"{old} has moved: import {new}(;|$)"
    with pytest.raises(ImportError, match=message) as error:
        importlib.import_module(old)
    # `from package import old` would hide the message of this kind of error.
    assert not isinstance(error.value, ModuleNotFoundError)
    importlib.import_module(new)


@pytest.mark.parametrize(
    ("statement", "new"),
    [
        ("import wsekern.kernels.cannon", "wsekern.kernels.matmul.cannon"),
        ("from wsekern.kernels import cannon", "wsekern.kernels.matmul.cannon"),
        ("from wsekern.kernels.cannon import cannon_matmul", "wsekern.kernels.matmul.cannon"),
        ("from wsekern import pictures", "wsekern.estimator.pictures"),
    ],
)
def test_every_form_of_import_names_the_new_path(statement, new):
    with pytest.raises(ImportError, match=f"has moved: import {new}$"):
        exec(statement, {})


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("models", "models.llama", "models.families.llama"),
        ("training", "training.launch", "wsekern.wafer.launch"),
    ],
)
def test_old_paths_are_known_when_a_folder_above_wsekern_alone_is_imported(package, old, new):
    program = f"import {package}\nimport {old}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"ImportError: {old} has moved: import {new}\n" in run.stderr


@pytest.mark.parametrize("old", wsekern.moved.NAMES)
def test_an_old_name_says_how_to_import_it_now(old):
    statement = wsekern.moved.NAMES[old]
    old_module, _, old_name = old.rpartition(".")
    new_module, new_name = statement.removeprefix("from ").split(" import ")
    with pytest.raises(ImportError, match=f"^{old} has moved: {statement}$"):
        exec(f"from {old_module} import {old_name}", {})
    assert hasattr(importlib.import_module(new_module), new_name)


@pytest.mark.parametrize("module", ["training.config", "wsekern.kernels.matmul"])
def test_a_name_that_never_was_cannot_be_imported(module):
    with pytest.raises(ImportError, match=f"^cannot import name 'nonsense' from '{module}'"):
        exec(f"from {module} import nonsense", {})


def test_what_can_be_imported_from_a_family_still_can_be():
    from wsekern.kernels.stencil import stencil, stencil_tile

    assert (stencil, stencil_tile) == (wsekern.stencil, wsekern.stencil_tile)


def test_a_module_below_a_folder_that_moved_names_the_folders_new_path():
    with pytest.raises(ImportError, match="wsekern.pictures has moved: import wsekern.estimator.p"):
        importlib.import_module("wsekern.pictures.roofline")


@pytest.mark.parametrize("name", ["wsekern.nonsense", "wsekern.kernels.nonsense"])
def test_a_module_that_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        importlib.import_module(name)


def test_the_finder_is_put_up_once():
    wsekern.moved.put_up_signposts()
    assert sys.meta_path.count(wsekern.moved._Signpost) == 1
