"""A sweep from one pre-trained encoder to a branch for every task: teachers, students, and the choice among them."""

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_moebert.checkpoints.drafts import naming
from hf_moebert.checkpoints.locks import lock_folder
from hf_moebert.methods.distillation import DistillationConfig, DistillationTrainer

from .configuration_multitask import check_task_name
from .functional import choose_depth, choose_uniform
from .modeling_multitask import MultiTaskModel
from .modeling_splitting import find_head, join, take_branch, take_trunk
from .modeling_trunk import layers_of, new_branch
from .recipe import INITS, MultiTaskSweepConfig
from .training_runs import (
    MultiTaskSweepTask,
    PreparedTask,
    Run,
    check_model,
    describe_arguments,
    read_result,
    write_result,
)
from .training_states import CachedStates, pad_examples


logger = logging.get_logger(__name__)


class MultiTaskSweep:
    """A search, for every task, of the layers to freeze and of the few to keep above them.

    Each task is searched by itself. Teachers train the top layers of the encoder on cached states of the frozen ones.
    The best on the dev examples teaches students with fewer layers on the same frozen ones, by the loss
    `CE + T^2 CE_soft`. A branch gets one more layer as long as it gains `min_gain`.

    Every run writes a folder `<output_dir>/<task>/<run>`: the plain single-task model, whose `config.frozen_layers` is
    where it may be split, and `result.json`, which is written last and lists the SHA-256 of the other files. A run
    with this file is not repeated. One sweep at a time trains in a folder.

    Args:
        tasks: Tasks by name, which also names a folder.
        args: Arguments of the stock `Trainer` of every run; `output_dir` is the folder of the sweep.
        config: Recipe, by default `MultiTaskSweepConfig()`.
        states_dir: Folder for the cached states, shared by sweeps over the same data; by default in `output_dir`.
        allow_changes: Whether runs that were made with other settings count as finished.

    Raises:
        ValueError: If there is no task, a name cannot name a folder, or the recipe does not fit the encoder; later, if
            the folder holds runs of other settings or states of another trunk.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377. Cached states, and the frozen layers without dropout
    that they mean, are our own design.
    """

    def __init__(
        self,
        tasks: Mapping[str, MultiTaskSweepTask],
        args: TrainingArguments,
        config: MultiTaskSweepConfig | None = None,
        *,
        states_dir: str | Path | None = None,
        allow_changes: bool = False,
    ) -> None:
        for name in tasks:
            check_task_name(name, [taken for taken in tasks if taken != name])
        if not tasks:
            raise ValueError("`tasks` must hold at least one task, got none. Name one.")
        self.args, self.config = args, MultiTaskSweepConfig() if config is None else config
        self.output, self.allow_changes = Path(args.output_dir), allow_changes
        states = self.output / "states" if states_dir is None else Path(states_dir)
        self.tasks = {name: PreparedTask(task, states / name, seed=args.seed) for name, task in tasks.items()}
        (first, expected), *_ = self.tasks.items()
        self.config.check_depth(expected.depth)
        for name, prepared in self.tasks.items():
            if prepared.fingerprints["encoder"] != expected.fingerprints["encoder"]:
                raise ValueError(
                    f"`tasks` must share one encoder, got another for {name!r} than for {first!r}. Let every"
                    " `new_model` load the same pre-trained weights."
                )

    def runs(self) -> Iterator[tuple[str, Run]]:
        """Yield task and run of the whole sweep in order; students of a task depend on the scores of its teachers."""
        for task, prepared in self.tasks.items():
            yield task, Run("whole", prepared.depth)
            yield from ((task, Run("teacher", layers)) for layers in sorted(self.config.teacher_layers))
            teacher = self.choose_teacher(task)
            yield from (
                (task, Run("student", layers)) for layers in sorted(self.config.student_layers) if layers < teacher
            )

    def run(self) -> None:
        """Make all missing runs, with a progress bar on a terminal unless `args.disable_tqdm`."""
        bar = tqdm(self.runs(), unit="run", disable=self.args.disable_tqdm or None)
        with lock_folder(self.output):
            for task, run in bar:
                bar.set_postfix_str(f"{task}, {run.name}")
                self.make(task, run)

    def make(self, task: str, run: Run) -> float:
        """Train and save a model unless it exists, and return its score on the dev examples.

        Raises:
            ValueError: If the folder holds a run of other settings, another process trains in `output_dir`, or the
                score is not finite.
            OSError: If the run cannot be saved.
        """
        folder, settings = self.folder(task, run), self.settings(task, run)
        if (result := read_result(folder)) is not None:
            self._check_settings(folder, settings, result["settings"])
            return result["score"]
        with lock_folder(self.output):
            return self._make(task, run, settings)

    def _check_settings(self, folder: Path, settings: dict[str, Any], saved: dict[str, Any]) -> None:
        names = sorted(saved.keys() | settings.keys())
        changed = [name for name in names if saved.get(name) != settings.get(name)]
        pairs = "; ".join(f"{name}: {settings.get(name)} here, {saved.get(name)} there" for name in changed)
        if changed and not self.allow_changes:
            raise ValueError(
                f"{folder} must hold a run of these settings, but it was made with others: {pairs}. Choose another"
                " `output_dir`, delete it, or pass `allow_changes=True` to take it as it is."
            )
        if changed:
            logger.warning_once(f"{folder} was made with other settings, and is taken as it is: {pairs}.")

    def _make(self, task: str, run: Run, settings: dict[str, Any]) -> float:
        folder, trainer = self.folder(task, run), self._train(task, run)
        score = trainer.evaluate()["eval_score"]
        if not math.isfinite(score):
            raise ValueError(
                f"The score of {task!r}, {run.name}, must be finite, got {score}. Check its `score`, or train with a"
                " smaller `learning_rate`."
            )
        model = self._plain(task, run, trainer.model)
        with naming(folder):
            model.save_pretrained(folder)
        write_result(folder, {"score": score, "settings": settings, "command": " ".join(sys.argv)})
        return score

    def choose_teacher(self, task: str) -> int:
        """Return the layers of the best teacher on the dev examples, of equal ones the fewest; make missing runs."""
        scores = {layers: self.make(task, Run("teacher", layers)) for layers in self.config.teacher_layers}
        return min(scores, key=lambda layers: (-scores[layers], layers))

    def student_scores(self, task: str) -> dict[int, float]:
        """Return the score of each number of layers on the dev examples; make missing runs."""
        return {run.layers: self.make(task, run) for run in map(self.branch(task), self.config.student_layers)}

    def choose_depths(self, min_gain: float | None = None, *, uniform: bool = False) -> dict[str, int]:
        """Choose the number of layers of each branch; make missing runs.

        Args:
            min_gain: Points that one more layer must gain, by default those of the recipe.
            uniform: Whether all tasks get the same number, chosen by the mean of their scores. A teacher with fewer
                layers keeps its own.
        """
        points = self.config.min_gain if min_gain is None else min_gain
        if uniform:
            layers = self.config.student_layers
            scores = {task: {n: self.make(task, self.branch(task)(n)) for n in layers} for task in self.tasks}
            return dict.fromkeys(self.tasks, choose_uniform(scores, points / 100))
        return {task: choose_depth(self.student_scores(task), points / 100) for task in self.tasks}

    def branch(self, task: str) -> Callable[[int], Run]:
        """Return a function from a number of layers to its run: a student, or the teacher where it has no more."""
        teacher = self.choose_teacher(task)
        return lambda layers: Run("student", layers) if layers < teacher else Run("teacher", teacher)

    def load(self, task: str, run: Run) -> PreTrainedModel:
        """Load the plain single-task model of a run.

        Raises:
            ValueError: If its files are not as they were when the run was finished.
        """
        folder = self.folder(task, run)
        check_model(folder)
        (architecture,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        head: Any = find_head(architecture)
        return head.from_pretrained(folder, use_safetensors=True)

    def merge(self, depths: Mapping[str, int]) -> MultiTaskModel:
        """Merge the branches with the given number of layers for each task; make missing runs."""
        runs = {task: self.branch(task)(layers) for task, layers in depths.items()}
        for task, run in runs.items():
            self.make(task, run)
        return MultiTaskModel.from_tasks({task: self.load(task, run) for task, run in runs.items()})

    def folder(self, task: str, run: Run) -> Path:
        """Return the folder of a run."""
        return self.output / task / run.name

    def settings(self, task: str, run: Run) -> dict[str, Any]:
        """Return all settings that decide the result of a run, as JSON holds them."""
        settings = describe_arguments(self.args) | asdict(run) | self.tasks[task].fingerprints
        if run.kind == "student":
            recipe = {"teacher": self.choose_teacher(task)}
            settings |= recipe | {name: getattr(self.config, name) for name in ("student_init", "temperature")}
        return json.loads(json.dumps(settings, default=str))

    def _train(self, task: str, run: Run) -> Trainer:
        prepared = self.tasks[task]
        args = copy.deepcopy(self.args)
        args.output_dir = str(self.folder(task, run) / "checkpoints")
        set_seed(args.seed)  # for new heads; the Trainer sets it again
        options: dict[str, Any] = {}
        if run.kind == "student":
            teacher = self.load(task, Run("teacher", self.choose_teacher(task)))
            frozen = teacher.config.frozen_layers
            model = new_student(teacher, run.layers, init=self.config.student_init, encoder=prepared.task.new_model())
            recipe = DistillationConfig(hidden_states=False, temperature=self.config.temperature)
            options = {"teacher": take_branch(teacher, frozen), "distillation": recipe}
        elif run.kind == "teacher":
            frozen = prepared.depth - run.layers
            model = take_branch(prepared.task.new_model(), frozen)
        else:
            frozen, model = None, prepared.task.new_model()
        train, dev = (self._data(task, split, frozen) for split in ("train", "dev"))
        trainer = (DistillationTrainer if options else Trainer)(
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=dev,
            data_collator=pad_examples,
            compute_metrics=lambda predictions: {"score": float(prepared.task.score(predictions))},
            **options,
        )
        # Losses are means over the micro-batch. By default the Trainer trusts every model with `**kwargs` to divide by
        # the items of the whole batch, which stock heads do not do.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        return trainer

    def _data(self, task: str, split: str, frozen: int | None) -> Dataset | CachedStates:
        prepared = self.tasks[task]
        if frozen is None:
            return prepared.examples(split)
        depths = sorted(prepared.depth - layers for layers in self.config.teacher_layers)
        return prepared.states(split, depths, self.args.device)[frozen]

    def _plain(self, task: str, run: Run, model: PreTrainedModel) -> PreTrainedModel:
        if run.kind == "whole":
            return model
        return join(take_trunk(self.tasks[task].task.new_model(), model.config.frozen_layers), model.cpu())


def new_student(
    teacher: PreTrainedModel, num_layers: int, *, init: str = "teacher", encoder: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Make an untrained branch from a trained model.

    Args:
        teacher: Single-task model with `config.frozen_layers`. It is not changed.
        num_layers: Layers of the branch.
        init: Initial layers: the first ones of the teacher ("teacher"), those of `encoder` after the frozen ones
            ("next"), or random ones ("random"). Pooler and head are those of the teacher.
        encoder: Pre-trained encoder in a model of the teacher's class, for "next".

    Raises:
        ValueError: If there is no such `init`, or "next" has no encoder.

    Source: Wei et al. 2022, https://arxiv.org/abs/2107.05377, for "teacher"; the others are our own design.
    """
    if init not in INITS:
        raise ValueError(f"`init` must be one of {', '.join(INITS)}, got {init!r}.")
    if init == "next" and encoder is None:
        raise ValueError('`encoder` must be given for `init="next"`, got None. Load the pre-trained model.')
    frozen = teacher.config.frozen_layers
    student = take_branch(teacher, frozen, num_layers)
    layers = layers_of(student)
    if encoder is not None and init == "next":
        layers.load_state_dict(layers_of(take_branch(encoder, frozen, num_layers)).state_dict())
    elif init == "random":
        layers.load_state_dict(layers_of(new_branch(type(teacher), copy.deepcopy(student.config))).state_dict())
    return student
