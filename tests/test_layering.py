"""The laws of the house, read off the source: the tree, the roles of files, the order of imports, and what travels."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from copies import COPIES, ROOT, TARGETS, wanted_text
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer


PACKAGE = Path(__file__).parents[1] / "hf_moebert"
# Each package may import those of lower levels, and nothing else of ours.
LEVELS = (
    ("architectures",),
    ("checkpoints", "data", "training"),
    ("runtime",),
    ("inference", "reporting"),
    ("measuring", "methods"),
    ("compress", "serving"),
    ("registration",),
    ("__init__", "cli", "cli_compress", "cli_serve"),
    ("__main__",),
)
ROLES = ("configuration", "conversion", "functional", "modeling", "pipeline", "recipe", "training")
BELOW = {  # the roles that a file of each role may import
    "functional": {"functional"},
    "configuration": {"functional", "configuration"},
    "recipe": {"functional", "configuration"},
    "modeling": {"functional", "configuration", "modeling"},
    "conversion": set(ROLES) - {"pipeline", "training"},
    "pipeline": set(ROLES) - {"training"},
    "training": set(ROLES),
}
# Methods that may import another one
FRIENDS = {("mpoe", "mpo"), ("multitask", "masked_crf"), ("multitask", "distillation")}
# Methods whose code does not travel with a checkpoint: they are made of more than one method
STAY = {"mpo", "mpoe", "multitask"}
TRAVELS = {"configuration", "functional", "modeling"}
# What code that travels may import besides its flat siblings
EVERYWHERE = {"torch", "numpy", "safetensors", "transformers", "huggingface_hub"} | sys.stdlib_module_names
# Private attributes of transformers that have no public equivalent: the implementations that a config resolved to, the
# Auto class that a class is saved for, and the tensors that a class does not save, does not need, or shares
WITHOUT_PUBLIC_WAY = {
    "_attn_implementation",
    "_auto_class",
    "_experts_implementation",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_no_split_modules",
    "_tied_weights_keys",
}

METHODS = sorted(path.name for path in (PACKAGE / "methods").iterdir() if (path / "__init__.py").is_file())
SOURCES = sorted(PACKAGE.rglob("*.py"))


def role(path):
    return path.stem.split("_")[0]


def level(package):
    return next(number for number, packages in enumerate(LEVELS) if package in packages)


@cache
def parse(path):
    """Return the nodes of a file; one of our tests after the other walks through all files."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path):
    """Return every module that a file imports, those of ours from the root of the package: `.methods.mpo.recipe`."""
    folder, found = path.relative_to(PACKAGE).parent.parts, []
    for node in parse(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parents = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += ["." + ".".join([*parents, name]) for name in names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return [re.sub(r"^hf_moebert\b\.?", ".", name) for name in found]


def of_ours(path):
    """Return what a file imports of this package, as parts: `("methods", "mpo", "recipe")`."""
    return [tuple(name[1:].split(".")) for name in imported(path) if name.startswith(".") and name != "."]


def test_there_are_methods():
    assert {"distillation", "masked_crf", "mixture_of_masks", "moebert", "mpo", "multitask", "platon"} <= set(METHODS)


def test_every_package_has_its_place():
    known = {package for packages in LEVELS for package in packages}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= known
    assert {path.stem for path in PACKAGE.glob("*.py")} <= known


def test_packages_import_those_below_them():
    for path in SOURCES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in of_ours(path):
            if name[0] != own:
                assert level(name[0]) < level(own), f"{path} imports {'.'.join(name)}"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_holds_the_roles_and_nothing_else(method):
    folder = PACKAGE / "methods" / method
    assert (folder / "README.md").is_file()
    for path in folder.glob("*.py"):
        assert path.name == "__init__.py" or role(path) in ROLES, path
        assert path.stem in {"recipe", "pipeline"} or role(path) not in {"recipe", "pipeline"}, path


@pytest.mark.parametrize("method", METHODS)
def test_roles_import_those_below_them(method):
    for path in (PACKAGE / "methods" / method).glob("*.py"):
        for name in of_ours(path) if path.name != "__init__.py" else []:
            if name[:2] == ("methods", method):
                assert name[2].split("_")[0] in BELOW[role(path)], f"{path.name} imports {name[2]}"


@pytest.mark.parametrize("method", METHODS)
def test_methods_import_their_friends_alone(method):
    for path in (PACKAGE / "methods" / method).glob("*.py"):
        for name in of_ours(path):
            if name[0] == "methods" and name[1] != method:
                assert (method, name[1]) in FRIENDS, f"{path} imports {'.'.join(name)}"


@pytest.mark.parametrize("method", METHODS)
def test_equations_live_on_tensors(method):
    for path in (PACKAGE / "methods" / method).glob("functional*.py"):
        for name in imported(path):
            own = name.startswith(f".methods.{method}.functional")
            assert own or name.split(".")[0] in {"torch", "numpy"} | sys.stdlib_module_names, f"{path} imports {name}"
        assert not re.search(r"nn\.Module|nn\.Parameter", path.read_text()), path


@pytest.mark.parametrize("method", sorted(set(METHODS) - STAY))
def test_what_travels_is_self_contained(method):
    """`save_pretrained` copies these files; its copier understands `from .name import x` only."""
    for path in (PACKAGE / "methods" / method).glob("*.py"):
        if role(path) in TRAVELS:
            for name in imported(path):
                sibling = re.fullmatch(rf"\.methods\.{method}\.\w+", name)
                assert sibling or name.split(".")[0] in EVERYWHERE, f"{path.name} imports {name}"
            assert not re.search(
                r"^\s*from \.\.|^\s*from \.\w+\.|^\s*from \. import", path.read_text(), re.MULTILINE
            ), path


def test_nothing_unsafe_and_nothing_left_behind():
    for path in SOURCES:
        names = set()
        for node in parse(path):
            if isinstance(node, ast.Call):
                names.add(ast.unparse(node.func))
                assert not any(k.arg == "shell" and getattr(k.value, "value", None) for k in node.keywords), path
        assert not names & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "print"}, path
        assert not {n.split(".")[0] for n in imported(path)} & {"pickle", "dill", "joblib", "marshal", "shelve"}, path
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path


@cache
def private_names():
    """Return what transformers keeps to itself: private attributes of classes met here that have a public way."""
    met = (AutoModel, HfQuantizer, PreTrainedConfig, PreTrainedModel)
    classes = {base for cls in met for base in cls.__mro__}
    ours = {name for cls in classes if cls.__module__.startswith("transformers") for name in vars(cls)}
    private = {name for name in ours if re.match(r"_[a-z]", name)} | {"_weight_conversions"}
    return private - WITHOUT_PUBLIC_WAY


def test_the_private_state_of_transformers_is_left_alone():
    """A class may override a private method of its base; nothing reads or writes private state from outside."""
    for path in SOURCES:
        for node in parse(path):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in {"self", "cls", "super()"}:
                assert node.attr not in private_names(), f"{path}:{node.lineno} {node.attr}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in private_names(), f"{path}:{node.lineno} {node.value}"


def test_the_english_is_that_of_the_field():
    for path in SOURCES:
        assert not re.search(r'[Tt]he host\b|"""(Say|What|Whether) ', path.read_text()), path


def test_files_can_be_read_in_a_sitting():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.parametrize("target", TARGETS)
def test_copies_are_those_of_their_sources(target):
    assert (ROOT / target).read_text() == wanted_text(target), f"{target} is not up to date: run `make copies`"


def test_every_copy_is_listed():
    marked = {str(path.relative_to(ROOT)) for path in SOURCES if path.read_text().startswith("# Copied from ")}
    assert marked == set(TARGETS)
    assert all((ROOT / source).is_file() for source in COPIES)
