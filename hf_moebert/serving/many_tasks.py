"""A merged multi-task model as a predictor, whose tasks come and go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_moebert.architectures.protocols import AnswerOptions
from hf_moebert.inference.linears import Precision
from hf_moebert.inference.optimize import optimize_for_inference
from hf_moebert.methods.multitask.pipeline import MultiTaskPipeline


class ManyTasks:
    """A merged model, with a predictor's face; its answers are those of the pipeline "multitask".

    Tasks that are added compute in the precision of the others.

    Args:
        pipeline: Pipeline of the model.
        precision: Precision of linear layers, as `optimize_for_inference` takes it.
    """

    def __init__(self, pipeline: MultiTaskPipeline, precision: Precision = "float32") -> None:
        self.pipeline, self.precision = pipeline, precision
        self._optimize()

    def describe(self) -> dict[str, Any]:
        """Return kind and tasks."""
        return {"kind": "multi-task", "tasks": self.describe_tasks(), "max_length": self._longest}

    def describe_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the kind, the labels, and the numbers of shared and own layers of each task."""
        return self.pipeline.describe_tasks()

    def check(self, inputs: Any, options: AnswerOptions) -> None:
        """Refuse an input that no task, or not every task that was asked for, can read."""
        self.pipeline.check(inputs, listed(options))

    def answer(self, requests: Sequence[tuple[Any, AnswerOptions]]) -> list[Any]:
        """Answer inputs: `{"answers": {task: answer}, "truncated": bool}`; longer texts are cut."""
        return self.pipeline.answer([(inputs, listed(options)) for inputs, options in requests])

    def load_task(self, folder: Path) -> Any:
        """Load a task for `put_task`."""
        return self.pipeline.load_task(folder)

    def put_task(self, name: str, task: Any) -> None:
        """Add or replace a task, in the precision of the others."""
        self.pipeline.put_task(name, task)
        self._optimize()

    def remove_task(self, name: str) -> None:
        """Remove a task."""
        self.pipeline.remove_task(name)

    @property
    def _longest(self) -> int:
        return int(min(self.pipeline.tokenizer.model_max_length, self.pipeline.model.trunk.longest))

    def _optimize(self) -> None:
        """Pack the layers anew: tasks run from hidden states, in which padding stays."""
        if self.precision != "float32":
            optimize_for_inference(self.pipeline.model, precision=self.precision, skip_padding=False)


def listed(options: AnswerOptions) -> list[str] | None:
    """Return the tasks that a client asks for."""
    return None if options.tasks is None else list(options.tasks)
