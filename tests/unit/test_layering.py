"""Data flows one way through the rooms, and imports go the same way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "smt_hf"
MAY_IMPORT = {
    "errors": set(),
    "command_line": {"errors"},
    "upload": {"errors"},
    "recipe": {"errors", "training"},
    "student": set(),
    "teachers": {
        "errors",
        "student.configuration_smt_recurrent",
        "student.fast_weight_smt_recurrent",
        "student.layers_smt_recurrent",
        "student.recurrence_smt_recurrent",
    },
    "data": {"errors", "student.configuration_smt_recurrent"},
    "training": {"errors", "command_line", "upload", "student", "teachers", "data", "evaluation.free_run"},
    "evaluation": {"errors", "command_line", "student", "teachers", "data"},
    "publishing": {"errors", "command_line", "upload", "evaluation"},
    "experiments": {
        "errors",
        "command_line",
        "upload",
        "student",
        "teachers",
        "data",
        "training",
        "evaluation",
        "publishing",
    },
}


def imports_of(path):
    """Modules of ours that a file imports from other rooms."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path} reaches out of its room by a relative import"
        for name in names:
            if name == "smt_hf" or name.startswith("smt_hf."):
                yield name.removeprefix("smt_hf").removeprefix(".")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for name in imports_of(path):
        allowed = MAY_IMPORT[room] | {room}
        assert any(name == other or name.startswith(other + ".") for other in allowed), f"{path} imports {name}"


def test_the_travelling_files_need_nothing_of_ours():
    for path in (ROOT / "student").glob("*_smt_recurrent.py"):
        assert not list(imports_of(path))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} does not say what it is"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            simple = isinstance(node, ast.ClassDef) and node.name.endswith(("MLP", "Block", "PreTrainedModel"))
            assert simple or ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_no_catch_all_modules():
    assert not {path.stem for path in ROOT.rglob("*.py")} & {"utils", "common", "helpers", "base", "misc"}
