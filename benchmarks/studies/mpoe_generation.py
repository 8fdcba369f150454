"""Go on training a language model, dense or with experts that share central tensors, for the same steps.

    python benchmarks/studies/mpoe_generation.py --smoke --output_dir build/mpoe-smoke
    python benchmarks/studies/mpoe_generation.py --from_scratch true --train_file train.txt \
        --validation_file test.txt --pretrain_steps 600 --max_steps 300 --learning_rate 1e-3 --seeds 0 1 2 \
        --output_dir build/mpoe-gpt2
    python benchmarks/studies/mpoe_generation.py --model_name_or_path google/flan-t5-small --train_file train.txt \
        --validation_file test.txt --max_steps 100 --learning_rate 3e-4 --output_dir build/mpoe-t5

Every argument of `TrainingArguments` may be given; the others are below. All kinds start from one dense model,
`start`: the one that is named, or a small GPT-2 that is first trained from scratch on the training text, one for all
seeds:

- `dense`: goes on as it is;
- `mpoe`: every feed-forward network becomes experts that share central tensors;
- `mpoe-switch`: the same with the other router, and a balance loss;
- `mpoe-masked`: as `mpoe`, with the gradient mask;
- `unshared`: as `mpoe`, but each expert has central tensors of its own.

Finished runs are not repeated when the command is run again.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_task import LanguageArguments, LanguageTask, make_smoke_text
from study import Run, Study, StudyOptions
from torch import Tensor
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_moebert import MPOEGradientMaskCallback, MPOEGradientMaskConfig
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.methods.mpoe import MPOEGPT2LMHeadModel, MPOET5ForConditionalGeneration
from hf_moebert.reporting.pictures import plot_curves


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mpoe": {"router": "reference"},
    "mpoe-switch": {"router": "switch"},
    "mpoe-masked": {"router": "reference"},
    "unshared": {"router": "reference", "share_centre": False},
}
CLASSES = {"gpt2": MPOEGPT2LMHeadModel, "t5": MPOET5ForConditionalGeneration}
ABOUT = """\
{start} All other rows go on from there for the same steps on the same data with the same learning rate, and every \
weight is trained. `active` counts the weights that one token meets, `largest share` is that of the tokens which go \
to the busiest of {experts} experts, a mean over the converted blocks.\
"""


@dataclass
class MPOEOptions(StudyOptions):
    """Runs of the study."""

    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": "Rows of the table."})
    num_experts: int = field(default=4, metadata={"help": "Experts of each block."})
    keep: float | None = field(default=None, metadata={"help": "See MPOEGradientMaskConfig."})
    pretrain_steps: int = field(default=600, metadata={"help": "Steps of the dense model, if from scratch."})
    pretrain_rate: float = field(default=1e-3, metadata={"help": "Its learning rate."})
    rounds: int = field(default=8, metadata={"help": "Training steps of each kind that are timed in turns."})


class UpdateSizes(TrainerCallback):
    """Log how far an optimiser step moves central and auxiliary tensors, relative to their size."""

    def __init__(self) -> None:
        self.squares: dict[str, list[float]] = {"central": [], "auxiliary": []}

    def tensors(self, model: PreTrainedModel) -> dict[str, list[Tensor]]:
        """Return the tensors of all chains of a model."""
        networks = model.networks().values()
        return {
            "central": [core for network in networks for core in network.centres.values()],
            "auxiliary": [core for network in networks for core in network.auxiliary.parameters()],
        }

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what the step will change."""
        self.before = {kind: [core.clone() for core in cores] for kind, cores in self.tensors(kwargs["model"]).items()}

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare."""
        for kind, cores in self.tensors(kwargs["model"]).items():
            moved = sum(float((new - old).square().sum()) for new, old in zip(cores, self.before[kind], strict=True))
            self.squares[kind].append(moved / sum(float(old.square().sum()) for old in self.before[kind]))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the root mean square of the steps since the last entry."""
        if self.squares["central"]:
            state.log_history[-1] |= {kind: float(np.mean(of) ** 0.5) for kind, of in self.squares.items()}
            self.squares = {kind: [] for kind in self.squares}


class GenerationStudy(Study):
    """Runs that differ in what the feed-forward networks of one language model become."""

    def folder(self, name: str, seed: int) -> Path:
        """Make one start for all seeds."""
        return super().folder(name, self.options.seeds[0] if name == "start" else seed)

    def arguments(self, run: Run) -> TrainingArguments:
        """Train the start with steps and learning rate of its own, if it is not a trained one."""
        args = copy.deepcopy(self.args)
        if run.name == "start":
            pretrains = self.task.arguments.from_scratch
            args.max_steps = self.options.pretrain_steps if pretrains else -1
            args.num_train_epochs, args.learning_rate = 0, self.options.pretrain_rate
        return args

    def settings(self, run: Run) -> dict:
        """Add the sizes of the model, and how its experts are made."""
        settings = super().settings(run) | asdict(self.task.arguments)
        if run.name in KINDS and run.name != "dense":
            settings |= {"num_experts": self.options.num_experts, **KINDS[run.name]}
        return settings | ({"keep": self.options.keep} if run.name == "mpoe-masked" else {})

    def start(self, run: Run, seed: int) -> PreTrainedModel:
        """Give the dense model its experts."""
        model = super().start(run, seed)
        if run.name in ("start", "dense"):
            return model
        experts = CLASSES[model.config.model_type]
        return experts.from_dense(model, num_experts=self.options.num_experts, seed=seed, **KINDS[run.name])

    def extras(self, run: Run, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Watch the tensors of the chains, and mask where it is asked for."""
        if run.name in ("start", "dense"):
            return {}
        masks = [MPOEGradientMaskCallback(MPOEGradientMaskConfig(keep=self.options.keep))]
        return {"callbacks": [*(masks if run.name == "mpoe-masked" else []), UpdateSizes()]}

    def sizes(self, model: PreTrainedModel, run: Run, seed: int) -> dict[str, int]:
        """Count all weights, those that one token meets, and the bytes on disk."""
        footprint = measure_footprint(model, seq_len=1, folder=self.folder(run.name, seed))
        return {"stored": footprint.total, "active": footprint.active, "bytes": footprint.bytes_on_disk}

    def findings(self, trainer: Trainer, run: Run) -> dict[str, Any]:
        """Keep what was logged, and which experts were used."""
        experts = hasattr(trainer.model, "networks")
        load = self.task.measure_load(trainer.model) if experts else []
        return {"log": trainer.state.log_history, "load": load}

    def rows(self, runs: list[Run], seeds: list[int]) -> list[dict[str, str]]:
        """Add to each row how unevenly its experts are used."""
        rows = super().rows(runs, seeds)
        for row, run in zip(rows, runs, strict=True):
            loads = [max(of_block) for seed in seeds for of_block in self.result(run.name, seed)["load"]]
            row["largest share"] = f"{np.mean(loads):.0%}" if loads else "–"
        return rows

    def pictures(self, runs: list[Run], seeds: list[int]) -> list[tuple[str, Path]]:
        """Draw perplexity by parameters, a point for each seed, and the sizes of updates, means over the seeds."""
        results = {run.name: [self.result(run.name, seed) for seed in seeds] for run in runs}
        score = self.task.metrics["perplexity"]
        points, updates = {}, {}
        for name, of_run in results.items():
            scores = [score(np.array(result["predictions"]), self.task.references) for result in of_run]
            points[name] = [result["sizes"]["stored"] / 1e6 for result in of_run], scores
            for kind in ("central", "auxiliary") if name in ("mpoe", "mpoe-masked") else ():
                logs = [[entry for entry in result["log"] if kind in entry] for result in of_run]
                means = np.mean([[entry[kind] for entry in log] for log in logs], axis=0)
                updates[f"{name}: {kind}"] = [entry["step"] for entry in logs[0]], means
        files = {"perplexity by parameters": "perplexity.png", "size of a step": "updates.png"}
        plot_curves(points, self.output / "perplexity.png", x="stored parameters, millions", y="perplexity")
        if not updates:
            return [("perplexity by parameters", self.output / "perplexity.png")]
        plot_curves(updates, self.output / "updates.png", x="step", y="relative size of an update, root mean square")
        return [(caption, self.output / file) for caption, file in files.items()]


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((LanguageArguments, MPOEOptions, TrainingArguments))
    arguments, options, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_text(arguments, Path(args.output_dir) / "inputs")
        args.logging_steps, args.save_strategy, args.max_steps = 1, "no", 4
        options.pretrain_steps, options.rounds, options.samples = 4, 2, 50
    study = GenerationStudy(LanguageTask(arguments), args, options)

    kinds = [Run(kind, start="start", peer="start" if kind == "dense" else "dense") for kind in options.kinds]
    runs = [Run("start"), *kinds]
    study.make_all(runs, options.seeds)

    start = "`start` is a GPT-2 trained from scratch." if arguments.from_scratch else "`start` is a pre-trained model."
    about = ABOUT.format(start=start, experts=options.num_experts)
    column = f"time of a step over {kinds[0].name}, float32, inputs of {{shape}}"
    speed = study.step_rows(kinds, options.seeds[0], column, rounds=options.rounds)
    study.report("Experts that share central tensors", about, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
