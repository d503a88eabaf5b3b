"""The house keeps its shape: imports point down, and every room imports only what lies below it."""

import ast
import re
from pathlib import Path

import pytest
from launch import ROOT

PACKAGE = ROOT / "custom_diffusion"
# From the ground up. What stands on one floor does not import its neighbours.
FLOORS = [
    {"errors", "files", "families", "images", "class_folder", "progress"},
    {"single_file"},
    {"cli", "retrieval", "weights"},
    {"model"},
    {"training", "evaluation"},
    {"tools"},
    {"__init__", "__main__"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
SCRIPTS = ["train_custom_diffusion.py", "retrieve.py"]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms that a file imports anything of, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if match := re.match(r"custom_diffusion\.(\w+)", name):
                yield match.group(1)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    for imported in set(imported_rooms(path)):
        if imported in FLOOR_OF:  # else a name of the package itself
            assert imported == room or FLOOR_OF[imported] < FLOOR_OF[room], f"{path}: {room} imports {imported}"


def test_every_file_has_a_room():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == FLOOR_OF.keys()


def test_nothing_below_imports_the_scripts():
    modules = {script.removesuffix(".py") for script in SCRIPTS}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert modules.isdisjoint(names), path


def test_families_are_told_apart_in_one_file():
    """No other asks whether a model is an SDXL one; the flags' help may speak of it."""
    allowed = {"families.py", "training_flags.py"}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        found = re.search(r"(?i)(?<![a-z])(sd)?xl(?![a-z])", path.read_text(encoding="utf-8"))
        assert found is None or path.name in allowed, f"{path}: {found}"


def test_file_names_are_written_once():
    """The names of the trained folder's and the checkpoints' files stand in `files.py` alone."""
    names = ["pytorch_custom_diffusion_weights", "custom_diffusion_deltas", "custom_diffusion_config.json",
             "training_state.pt", "checkpoint.json", "model_index.json"]  # fmt: skip
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        if path.name == "files.py":
            continue
        strings = _code_strings(path)
        for name in names:
            found = [string for string in strings if re.search(rf"(?<![\w.-]){re.escape(name)}(?!\w)", string)]
            assert not found, f"{path}: {found[0]!r}"


def _code_strings(path: Path) -> list[str]:
    """String constants of a file but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
