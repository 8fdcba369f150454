"""The console script `hf-moebert`.

It lies beside the package, not inside: before any module of a package Python imports `hf_moebert/__init__.py`, which
imports torch and registers all models. This loads `cli.py` alone, so that `--help` and completion answer at once.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Run the command line, whose commands import the package when they need it."""
    load_alone("cli.py").app(prog_name="hf-moebert")


def load_alone(file: str) -> ModuleType:
    """Load one file of the package without the package; it must import nothing of it.

    Args:
        file: Path inside the package.
    """
    package = importlib.util.find_spec("hf_moebert")
    assert package is not None  # it is installed together with this file
    assert package.origin is not None
    path = Path(package.origin).parent / file
    spec = importlib.util.spec_from_file_location(f"hf_moebert_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where `dataclass` looks its module up
    spec.loader.exec_module(module)
    return module
