"""The outcome of a compression."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_moebert.checkpoints.json_files import read_json
from hf_moebert.checkpoints.loading import load_model

from .recipe import Recipe
from .recipe_file import parse_recipe
from .verdict import Verdict


GIVEN, COMPRESSED = "given", "compressed"  # names of the models in a measurement
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class CompressionResult:
    """Everything that a compression leaves.

    Attributes:
        folder: The folder of the run.
        recipe: What was done.
        stages: What each stage was told and took.
        measurement: Size, speed and scores of the given model and of the result; see `measuring.comparison.measure`.
        verdict: Which targets are met.
        candidates: What a search tried, one row each.
    """

    folder: Path
    recipe: Recipe
    stages: list[dict[str, Any]]
    measurement: dict[str, Any]
    verdict: Verdict
    candidates: list[dict[str, str]]

    @property
    def model_folder(self) -> Path:
        """The compressed model, which an Auto class loads after `import hf_moebert`."""
        return self.folder / "model"

    @property
    def name(self) -> str:
        """The name of the result in its measurement."""
        return result_name(self.recipe)

    def load(self) -> PreTrainedModel:
        """Load the compressed model."""
        return load_model(self.model_folder)


def read_result(folder: str | os.PathLike[str]) -> CompressionResult:
    """Read the result of a run that has ended.

    Args:
        folder: Folder of the run.

    Raises:
        ValueError: If its report is damaged.
        OSError: If there is none.
    """
    facts = read_json(Path(folder) / REPORT_FILE, remedy="Resume the run.")
    parts = {name: facts[name] for name in ("stages", "measurement", "candidates")}
    return CompressionResult(Path(folder), parse_recipe(facts["recipe"]), verdict=Verdict(**facts["verdict"]), **parts)


def result_name(recipe: Recipe) -> str:
    """Return the name of the result in its measurement."""
    return COMPRESSED if recipe.precision is None else f"{COMPRESSED}, {recipe.precision}"
