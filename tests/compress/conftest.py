"""A tiny classifier, and what a stack of stages made of it: tests copy them before they change anything."""

import pytest
from door_runs import STACK, run
from tiny_classifiers import save_classifier


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "model"
    save_classifier(folder, layers=2)
    return folder


@pytest.fixture(scope="session")
def finished(given, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    return run(given, output, STACK)
