"""The house's laws, read off the source: roles, directions of imports, and what may not be there."""

import ast
import re
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "hf_moebert"
ROLES = {"configuration", "functional", "modeling", "training"}
FRIENDS = {("mpoe", "mpo"), ("multitask", "masked_crf"), ("multitask", "distillation")}  # who may import whom
STAY = {"mpo", "mpoe", "multitask"}  # read with the package only: more than one system makes them
SYSTEMS = sorted(p.parent.name for p in PACKAGE.glob("*/functional.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))


def role(path):
    return path.stem.split("_")[0]


def imports(path):
    """Every imported module, relative ones written as they stand (`.functional`, `..schedules`)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_there_are_systems():
    assert {"moebert", "distillation"} <= set(SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_holds_the_four_roles_and_nothing_else(system):
    folder = PACKAGE / system
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.py"):
        assert path.name == "__init__.py" or role(path) in ROLES, path


@pytest.mark.parametrize("system", SYSTEMS)
def test_imports_point_one_way(system):
    below = {
        "configuration": {"functional"},
        "functional": {"functional"},
        "modeling": {"modeling", "functional", "configuration"},
        "training": ROLES,
    }
    for path in (PACKAGE / system).glob("*.py"):
        for name in imports(path) if path.name != "__init__.py" else []:
            if name.startswith(".") and not name.startswith(".."):
                assert name.lstrip(".").split("_")[0] in below[role(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_system_imports_another(system):
    for path in (PACKAGE / system).glob("*.py"):
        for name in imports(path):
            other = name.removeprefix("hf_moebert.").removeprefix("..").split(".")[0]
            if other != system and other in SYSTEMS and name.startswith(("hf_moebert.", "..")):
                assert (system, other) in FRIENDS, f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.name)
def test_shared_modules_know_no_system(path):
    if path.name != "__init__.py":
        for name in imports(path):
            assert name.lstrip(".").removeprefix("hf_moebert.").split(".")[0] not in SYSTEMS, f"{path} imports {name}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_equations_live_on_tensors(system):
    for path in (PACKAGE / system).glob("functional*.py"):
        for name in imports(path):
            allowed = {"torch", "numpy"} | sys.stdlib_module_names
            assert name.split(".")[0] in allowed or name.startswith(".functional"), name
        assert not re.search(r"nn\.Module|nn\.Parameter", path.read_text())


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_travels_is_self_contained(system):
    """`save_pretrained` copies these files; the copier understands `from .name import x` only."""
    if not list((PACKAGE / system).glob("modeling_*.py")) or system in STAY:
        return
    for path in (PACKAGE / system).glob("*.py"):
        if role(path) in {"configuration", "functional", "modeling"}:
            for name in imports(path):
                assert re.fullmatch(r"\.\w+", name) or not name.startswith("."), f"{path.name} imports {name}"
                if not name.startswith("."):
                    allowed = {
                        "torch",
                        "numpy",
                        "safetensors",
                        "transformers",
                        "huggingface_hub",
                    } | sys.stdlib_module_names
                    assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_and_nothing_left_behind(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
            assert not any(k.arg == "shell" and getattr(k.value, "value", None) for k in node.keywords), path
    assert not names & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "print"}, path
    assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_can_be_read_in_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 400, path
