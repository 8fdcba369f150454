"""What all tests share: this folder is importable from its subfolders, and the marks of the host's suite are known."""

from host_suite import MARKERS


def pytest_configure(config):
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: used by the host's own suite")
