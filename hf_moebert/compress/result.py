"""The outcome of a compression."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_moebert.checkpoints.loading import load_model

from .recipe import Recipe
from .verdict import Verdict


GIVEN, COMPRESSED = "given", "compressed"  # names of the models in a measurement


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


def result_name(recipe: Recipe) -> str:
    """Return the name of the result in its measurement."""
    return COMPRESSED if recipe.precision is None else f"{COMPRESSED}, {recipe.precision}"
