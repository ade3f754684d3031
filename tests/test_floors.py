"""The house's rules, read off the sources: who imports what, how long things are, their names."""

import ast
import collections
import functools
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# floor -> the floors below, which it may import
FLOORS: dict[str, set[str]] = {
    "wsekern": set(),
    "sharding": {"wsekern"},
    "models": {"wsekern", "sharding"},
    "training": {"wsekern", "sharding", "models"},
    "serving": {"wsekern", "sharding", "models"},
}
FAMILIES = ("matmul", "attention", "stencil", "experts", "dense")
# room -> its height: it may import the rooms that are lower
ROOMS = {
    "hardware": 0,
    "atomic_write": 0,
    "public_names": 0,
    "progress": 0,
    "closed_pipe": 0,
    "error_line": 0,
    "interrupts": 1,
    "wafer": 1,
    "fabric": 2,
}
ROOMS |= {f"kernels.{family}": 3 for family in FAMILIES} | {"kernels": 3}
ROOMS |= {"solvers": 4, "estimator": 5, "compiler": 6}
ROOMS |= {"sharding": 7, "models": 8, "training": 9, "serving": 9}
ABOVE = {"benchmarks", "examples"}  # these may import every floor, and none imports them
HOUSE = {*FLOORS, *ABOVE, "tests"}
COLLECTIVES = {"psum", "pmax", "pmin", "pmean", "ppermute", "all_gather", "psum_scatter"}
COLLECTIVES |= {"all_to_all", "axis_index", "axis_size", "pcast"}
# Parameters of kernels that are `Any` and hold no array.
NO_ARRAYS = {"dtype", "boundary", "side", "width", "option", "field", "out_specs"}


@functools.cache
def sources(*folders):
    """Each source file of the folders by its path from the root, and its syntax tree."""
    files = sorted(f for folder in folders for f in (ROOT / folder).rglob("*.py"))
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text()) for f in files}


def type_checkers_alone(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree, *, for_types=True):
    """What a file imports, as (module, name); the name is None in `import module`."""
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full path"
            yield from ((node.module, alias.name) for alias in node.names)
        elif for_types or not type_checkers_alone(node):
            nodes += ast.iter_child_nodes(node)


def module_of(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(tree, modules, **options):
    """The modules of ours that a file imports, or imports a name from."""
    for module, name in imports_of(tree, **options):
        if f"{module}.{name}" in modules:
            yield f"{module}.{name}"
        elif module in modules:
            yield module


def room_of(module):
    """The room that a module belongs to; None for the face and the command line, which see all."""
    top, *below = module.split(".")
    if top != "wsekern":
        return top
    if not below or below in (["cli"], ["moved"]):
        return None
    return ".".join(below[:2]) if below[0] == "kernels" else below[0]


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_those_below(floor):
    files, above = sources(floor), HOUSE - FLOORS[floor] - {floor}
    tops = {(file, m.split(".")[0]) for file, tree in files.items() for m, _ in imports_of(tree)}
    assert files and not [(file, top) for file, top in tops if top in above]


@pytest.mark.parametrize("folder", sorted(ABOVE))
def test_what_stands_above_imports_no_tests(folder):
    tops = {m.split(".")[0] for tree in sources(folder).values() for m, _ in imports_of(tree)}
    assert not tops & HOUSE - set(FLOORS) - {folder}


def test_no_imports_run_in_a_circle():
    trees = {module_of(f): tree for f, tree in sources(*FLOORS, *ABOVE).items()}
    graph = {
        module: set(imported_modules(tree, trees, for_types=False))
        for module, tree in trees.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_imports_between_rooms_run_down_those_for_types_and_in_functions_too():
    trees = {module_of(f): tree for f, tree in sources(*FLOORS).items()}
    upward = []
    for module, tree in trees.items():
        room = room_of(module)
        for other in imported_modules(tree, trees):
            other_room = room_of(other)
            # The face and the command line are imported by nobody but the floors above.
            hidden = other_room is None and module.startswith("wsekern") and room is not None
            if hidden or (
                room != other_room and room and other_room and ROOMS[room] <= ROOMS[other_room]
            ):
                upward.append((module, other))
    assert not upward
    assert {room_of(module) for module in trees} - {None} == set(ROOMS)


def test_kernels_are_folders_one_a_family():
    (loose,) = [f.name for f in (ROOT / "wsekern/kernels").glob("*.py")]
    assert loose == "__init__.py"
    assert {f"kernels.{family}" for family in FAMILIES} < set(ROOMS)


def test_no_module_of_ours_is_renamed_on_import():
    trees = sources(*FLOORS, *ABOVE)
    modules = {module_of(file) for file in trees}
    renamed = [
        (file, alias.name, alias.asname)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname not in (None, alias.name) and f"{node.module}.{alias.name}" in modules
    ]
    assert not renamed


def test_the_library_never_imports_its_own_face():
    submodules = {module_of(file) for file in sources("wsekern")}
    by_face = [
        (file, module, name)
        for file, tree in sources("wsekern").items()
        for module, name in imports_of(tree)
        if module == "wsekern" and f"wsekern.{name}" not in submodules
    ]
    assert not by_face


def users_of(names, tree, of_lax):
    """The lines that import one of `names` from jax, or use it as an attribute.

    With `of_lax`, only attributes of `jax.lax` count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if not of_lax or ast.unparse(node.value) in {"lax", "jax.lax"}:
                yield node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            if names & {alias.name for alias in node.names}:
                yield node.lineno


@pytest.mark.parametrize(
    ("home", "names"),
    [("wsekern/fabric/", COLLECTIVES), ("wsekern/wafer/on_devices.py", {"shard_map"})],
    ids=["collectives", "shard_map"],
)
def test_only_one_file_talks_between_pes_or_runs_kernels_on_them(home, names):
    users = {
        file: lines
        for file, tree in sources(*FLOORS, "examples").items()
        if (lines := list(users_of(names, tree, of_lax=names is COLLECTIVES)))
    }
    assert users and all(file.startswith(home) for file in users), users


def test_files_and_functions_stay_short():
    """600 lines a file and 90 a function at most; a review asks why from 400 and 60 on."""
    trees = sources(*FLOORS, *ABOVE)
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in trees}
    assert not {file: length for file, length in lengths.items() if length > 600}
    functions = {
        (file, node.name): (node.end_lineno or 0) - node.lineno + 1
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {where: length for where, length in functions.items() if length > 90}


def shapeless(hint):
    """The bare array types of an annotation: `jax.Array`, but not that of `Float[Array, "M K"]`.

    That of `Float[Array, ...]` is bare: without quotes, the annotation is not read and not checked.
    """
    if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
        hint = ast.parse(hint.value, mode="eval").body
    if isinstance(hint, ast.Subscript) and isinstance(hint.slice, ast.Tuple):
        *_, shape = hint.slice.elts
        if isinstance(shape, ast.Constant) and isinstance(shape.value, str):
            return set()
    if isinstance(hint, ast.Name | ast.Attribute):
        return {ast.unparse(hint)} & {"Array", "jax.Array"}
    return set().union(*map(shapeless, ast.iter_child_nodes(hint))) if hint else set()


def test_arrays_that_kernels_pass_on_carry_their_shapes():
    """No parameter or result is a bare array, and none that could be an array is `Any`."""
    offending = []
    rooms = sources("wsekern/fabric", "wsekern/kernels")
    for file, tree in rooms.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            a = node.args
            parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
            hints = {p.arg: p.annotation for p in parameters if p}
            any_type = {n for n, h in hints.items() if h and ast.unparse(h) == "Any"} - NO_ARRAYS
            bare = {n for n, h in (hints | {"return": node.returns}).items() if shapeless(h)}
            offending += [(file, node.lineno, node.name, name) for name in any_type | bare]
    assert not offending


def test_a_module_says_in_its_first_line_what_it_does():
    """And not "This file is ...": a line that stands alone in a list of modules."""
    first = {
        file: (ast.get_docstring(tree) or "").partition("\n")[0]
        for file, tree in sources(*HOUSE).items()
    }
    untold = [file for file, line in first.items() if not line and not file.startswith("tests")]
    assert not [file for file in untold if (ROOT / file).read_text().strip()]
    assert not [f for f, line in first.items() if line.startswith(("This file is", "This package"))]


def test_no_class_name_stands_in_three_places():
    places = collections.defaultdict(list)
    for file, tree in sources(*FLOORS, *ABOVE).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(file)
    assert not {name: files for name, files in places.items() if len(files) > 2}


def test_a_thing_lives_where_its_meaning_is():
    drawers = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    names = {file: set(pathlib.Path(file).with_suffix("").parts) for file in sources(*HOUSE)}
    assert not [file for file, parts in names.items() if parts & drawers]


@pytest.mark.parametrize("package", ["wsekern", "sharding", "models", "training"])
def test_every_public_name_comes_from_the_file_that_type_checkers_are_told(package):
    face = importlib.import_module(package)
    (for_types,) = [
        n for n in sources(package)[f"{package}/__init__.py"].body if type_checkers_alone(n)
    ]
    assert isinstance(for_types, ast.If)
    homes = {name: module for module, name in imports_of(ast.Module(for_types.body, []))}
    assert sorted(homes) == face.__all__ == dir(face)
    for name, module in homes.items():
        assert getattr(face, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'matmull'"):
        _ = face.matmull


def test_importing_the_packages_or_the_configuration_loads_no_jax():
    script = """
import sys
import wsekern, sharding, models, training
from training import TrainingConfig
from training.config import parse
print("jax" in sys.modules)
from training import Trainer
print("jax" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert run.stdout.split() == ["False", "True"], run.stderr
