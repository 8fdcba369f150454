"""The console script `hf-moebert`.

It lies beside the package, not inside: before any module of a package Python imports `hf_moebert/__init__.py`, which
imports torch and registers all models. This loads `cli.py` alone, so that `--help` and completion answer at once.
"""

import importlib.util
from pathlib import Path


def main() -> None:
    """Run the command line, whose commands import the package when they need it."""
    package = importlib.util.find_spec("hf_moebert")
    assert package is not None  # it is installed together with this file
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("hf_moebert_cli", Path(package.origin).with_name("cli.py"))
    assert spec is not None
    assert spec.loader is not None
    cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    cli.app(prog_name="hf-moebert")
