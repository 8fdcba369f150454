"""Make the feed-forward networks of a language model use fewer units: learned masks beside one-shot splits.

    python benchmarks/studies/mixture_of_masks_generation.py --smoke --output_dir build/masks-smoke
    python benchmarks/studies/mixture_of_masks_generation.py --from_scratch true --architecture llama \
        --train_file train.txt --validation_file test.txt --pretrain_steps 2000 --max_steps 1000 --learning_rate 1e-3 \
        --seeds 0 1 2 --output_dir build/masks-llama
    python benchmarks/studies/mixture_of_masks_generation.py --model_name_or_path google/flan-t5-small \
        --train_file train.txt --validation_file test.txt --max_steps 1000 --learning_rate 3e-4 \
        --output_dir build/masks-t5

Every argument of `TrainingArguments` and `MaskSparsityConfig` may be given, but that `--keep_ratios` takes the place
of `keep_ratio`; the others are below. All kinds start from one dense model, `start`, one for all seeds: the one that
is named, or a small one that is first trained from scratch on the training text. `dense` goes on as it is. The others
are made for each active share, train for the same steps, and what is saved and scored is the compact model:

- `masks`: masks are learned in the first part of the steps, then they are fixed, and the model recovers;
- `guided`: the same, but the masks of unimportant units start nearer to closing;
- `single`, `guided-single`: the same with one mask for all tokens;
- `random`, `clustered`, `importance`: as many experts, split in one shot; the model recovers in all of the steps;
- `importance-single`, `magnitude`: one narrower network of the units that are most important, or have the largest
  weights, likewise.

With `--taught` the start also teaches all of them. All rows of a seed read the same blocks in the same order, with the
same learning rate at each step. Finished runs are not repeated when the command is run again.
"""

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from labelled_text import make_smoke_task
from language_task import LanguageArguments, LanguageTask, make_smoke_text
from mask_runs import (
    GUIDED,
    LEARNED,
    ONE_SHOT,
    UNROUTED,
    MaskOptions,
    MaskRun,
    collate_for_both,
    draw_learning,
    measure_use,
    plan_masks,
    read_rows,
)
from study import Study, make_optimizer, mean_over_seeds, with_interval
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from hf_moebert import DistillationConfig, MaskSparsityCallback, MaskSparsityConfig, measure_importance
from hf_moebert.measuring.footprint import measure_footprint
from hf_moebert.measuring.scores import Score, bootstrap_interval
from hf_moebert.methods.mixture_of_masks import from_dense, shrink
from hf_moebert.reporting.pictures import plot_curves


ABOUT = """\
{start} All other rows go on from there for {steps} steps on the same blocks in the same order, with the same \
learning rate at each step; of those with learned masks the first {learned} steps close the masks. What is scored is \
the compact model. `active` counts the weights that one token meets if experts are equally busy, `units used` is the \
measured share of the feed-forward units, `largest share` that of the tokens which go to the busiest of {experts} \
experts; both are means over the blocks of the network. `perplexity over dense` is better the lower it is. All seeds \
share one start.\
"""


class MaskStudy(Study):
    """Runs that differ in which units of the feed-forward networks a token uses."""

    def __init__(
        self, task: LanguageTask, args: TrainingArguments, options: MaskOptions, recipe: MaskSparsityConfig
    ) -> None:
        super().__init__(task, args, options, DistillationConfig(hidden_states=False))
        self.recipe, self.blocks = recipe, task.train_dataset
        self.teacher = "start" if options.taught else None
        if task.arguments.from_scratch and not options.pretrain_steps:
            raise SystemExit("--pretrain_steps must be above 0 for a model from scratch. Use 2000.")
        self.first = MaskRun("start", steps=options.pretrain_steps)
        self.dense = MaskRun("dense", start="start", teacher=self.teacher, peer="start", steps=args.max_steps)

    def folder(self, name: str, seed: int) -> Path:
        """Make one start for all seeds."""
        return self.output / name if name == "start" else super().folder(name, seed)

    def plan(self, kind: str, keep_ratio: float) -> MaskRun:
        """Return the run of one row."""
        fields: dict[str, Any] = {"kind": kind, "keep_ratio": keep_ratio, "steps": self.args.max_steps}
        return MaskRun(f"{kind}-{keep_ratio:g}", start="start", teacher=self.teacher, peer="dense", **fields)

    def arguments(self, run: MaskRun) -> TrainingArguments:
        """Train each run for its own steps, on blocks that lie in the order in which they are read."""
        args = copy.deepcopy(self.args)
        args.max_steps, args.train_sampling_strategy = run.steps, "sequential"
        if run.name == "start":
            args.learning_rate = self.options.pretrain_rate
        if not run.steps:  # the start is good as it is
            args.max_steps, args.num_train_epochs = -1, 0
        return args

    def settings(self, run: MaskRun) -> dict:
        """Add the run, the model, and all that decides how masks are made."""
        settings = super().settings(run) | asdict(self.task.arguments) | asdict(run)
        settings["taught"] = self.options.taught
        names = ("lr_scheduler_type", "gradient_accumulation_steps", "warmup_steps", "weight_decay", "max_grad_norm")
        settings |= {name: getattr(self.args, name) for name in (*names, "adam_beta1", "adam_beta2")}
        settings |= {name: getattr(self.options, name) for name in ("pretrain_steps", "pretrain_rate")}
        if run.kind == "dense":
            return settings
        names = ("num_experts", "router_aux_loss_coef")
        names += ("group_size", "budget") if run.kind in LEARNED else ()
        names += ("importance_batches",) if run.kind in (*GUIDED, *ONE_SHOT) else ()
        settings |= {name: getattr(self.options, name) for name in names}
        recipe = asdict(self.recipe) if run.kind in LEARNED else {"router_rate": self.recipe.router_rate}
        return recipe | settings  # the share is that of the run

    def start(self, run: MaskRun, seed: int) -> PreTrainedModel:
        """Give a dense model masks, to be learned or from a one-shot split."""
        model, options = super().start(run, seed), self.options
        if run.kind == "dense":
            return model
        unrouted = run.kind in UNROUTED
        form: dict[str, Any] = {
            "num_experts": 1 if unrouted else options.num_experts,
            "router_aux_loss_coef": options.router_aux_loss_coef,
            "seed": seed,
        }
        model = model.to(self.args.device)
        if run.kind in LEARNED:
            form |= {name: getattr(options, name) for name in ("group_size", "budget")}
            if run.kind in GUIDED:
                form["importance"] = measure_importance(model, self.first_rows(seed), self.task.collator)
        else:
            shape = {"num_experts": form["num_experts"], "keep_ratio": run.keep_ratio}
            shape["data_collator"] = self.task.collator
            form["masks"] = plan_masks(run.kind, model, self.first_rows(seed), **shape, seed=seed)
        return from_dense(model, **form)

    def first_rows(self, seed: int) -> list[Any]:
        """Return the examples with which training begins."""
        size, count = self.args.per_device_train_batch_size, self.options.importance_batches
        return list(read_rows(self.blocks, size * count, seed=[seed]))

    def extras(self, run: MaskRun, seed: int, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """Learn masks; let all rows read the same blocks at the same learning rates."""
        options: dict[str, Any] = {}
        if run.kind in LEARNED:
            callback = MaskSparsityCallback(replace(self.recipe, keep_ratio=run.keep_ratio))
            optimizer, options["callbacks"] = callback.make_optimizer(model, args), [callback]
        else:
            optimizer = make_optimizer(model, args, part=".router.", rate=self.recipe.router_rate)
        if run.teacher is not None:
            options["data_collator"] = partial(collate_for_both, self.task.collator, model)
        count = max(run.steps, 1) * args.train_batch_size * args.gradient_accumulation_steps
        rows = read_rows(self.blocks, count, seed=[seed, 1] if run.name == "start" else [seed])
        return options | {"optimizers": (optimizer, None), "train_dataset": rows}

    def save(self, trainer: Trainer, run: MaskRun, folder: Path) -> None:
        """Save a model with masks as small as it has become, any other as it is."""
        if run.kind in LEARNED:
            trainer.model.fix_masks(run.keep_ratio)
        (trainer.model if run.kind == "dense" else shrink(trainer.model)).save_pretrained(folder)

    def sizes(self, model: PreTrainedModel, run: MaskRun, seed: int) -> dict[str, int]:
        """Count all weights, those that one token meets, and the bytes on disk."""
        saved = self.load(run.name, seed)
        footprint = measure_footprint(saved, seq_len=1, folder=self.folder(run.name, seed))
        return {"stored": footprint.total, "active": footprint.active, "bytes": footprint.bytes_on_disk}

    def findings(self, trainer: Trainer, run: MaskRun) -> dict[str, Any]:
        """Keep what was logged, and which units and experts are used."""
        use = {} if run.kind == "dense" else measure_use(trainer.model, self.task.batches(trainer.model, 128))
        return {"log": trainer.state.log_history, **use}

    def rows(self, runs: list[MaskRun], seeds: list[int]) -> list[dict[str, str]]:
        """Add to each row its score over the dense one, the units in use, and the load of the busiest expert."""
        rows, dense = super().rows(runs, seeds), self.predictions("dense", seeds)
        for row, run in zip(rows, runs, strict=True):
            for metric, score in self.task.metrics.items():
                both = np.stack([self.predictions(run.name, seeds), dense], axis=-1)  # (examples, seeds, 2)
                ratio_of = partial(ratio_of_scores, score)
                ratio = bootstrap_interval(ratio_of, both, self.task.references, rounds=self.options.samples)
                row[f"{metric} over dense"] = with_interval(ratio, ".1%")
            results = [self.result(run.name, seed) for seed in seeds]
            used = [share for result in results for share in result.get("used", [1.0])]
            loads = [max(of) for result in results for of in result.get("load", []) if len(of) > 1]
            row["units used"] = f"{np.mean(used):.1%}"
            row["largest share"] = f"{np.mean(loads):.0%}" if loads else "–"
        return rows

    def duels(self, runs: list[MaskRun], seeds: list[int]) -> list[dict[str, str]]:
        """Compare learned masks with every one-shot split at the same active share."""
        pairs = [(a, b) for a in runs for b in runs if a.kind in LEARNED and b.kind in ONE_SHOT]
        rows = []
        for learned, split in pairs:
            if learned.keep_ratio != split.keep_ratio:
                continue
            mine, other = (self.predictions(run.name, seeds) for run in (learned, split))
            row = {"learned": learned.name, "against": split.name}
            for metric, score in self.task.metrics.items():
                difference = self.difference(score, mine, other, self.task.references)
                row[f"{metric} difference"] = with_interval(difference, "+" + self.task.number)
            rows.append(row)
        return rows

    def pictures(self, runs: list[MaskRun], seeds: list[int]) -> list[tuple[str, Path]]:
        """Draw the scores by active share, means over the seeds, and how the first seed's masks were learned."""
        drawn = []
        for metric, score in self.task.metrics.items():
            means = {
                run: mean_over_seeds(score, self.predictions(run.name, seeds), self.task.references) for run in runs
            }
            curves = {}
            for kind in self.options.kinds:
                of_kind = sorted(
                    [self.dense, *(run for run in runs if run.kind == kind)], key=lambda run: -run.keep_ratio
                )
                curves[kind] = [run.keep_ratio for run in of_kind], [means[run] for run in of_kind]
            drawn.append((f"{metric} by active share", self.output / f"{metric}.png"))
            plot_curves(curves, drawn[-1][1], x="active share of the feed-forward units", y=metric)
        for run in runs:
            if run.kind in LEARNED:
                log = self.result(run.name, seeds[0])["log"]
                units = self.result(run.name, seeds[0])["units"]
                files = draw_learning(log, units, self.folder(run.name, seeds[0]))
                drawn += [(f"{run.name}: {caption}", file) for caption, file in files.items()]
        return drawn


def ratio_of_scores(score: Score, both: np.ndarray, references: np.ndarray) -> float:
    """Divide the mean score over seeds of one run by that of another; predictions `(examples, seeds, 2)`."""
    mine, other = (mean_over_seeds(score, both[..., n], references) for n in (0, 1))
    return mine / other


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((LanguageArguments, MaskOptions, MaskSparsityConfig, TrainingArguments))
    arguments, options, recipe, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_text(arguments, Path(args.output_dir) / "inputs")
        make_smoke_task(arguments, Path(args.output_dir) / "inputs")
        arguments.architecture, args.logging_steps, args.save_strategy = "llama", 1, "no"
        args.max_steps, options.pretrain_steps, options.importance_batches, options.samples = 10, 6, 2, 50
    study = MaskStudy(LanguageTask(arguments), args, options, recipe)

    plans = [study.plan(kind, ratio) for ratio in options.keep_ratios for kind in options.kinds]
    runs = [study.first, study.dense, *plans]
    study.make_all(runs, options.seeds)
    origin = "is trained from scratch" if arguments.from_scratch else "is a pre-trained model"
    more = f" (and trained for {options.pretrain_steps} steps)" if options.pretrain_steps else ""
    about = ABOUT.format(
        start=f"`start` {origin}{more}.",
        steps=args.max_steps,
        learned=recipe.learn_steps(args.max_steps),
        experts=options.num_experts,
    )
    duels = study.duels(runs, options.seeds)
    study.report("Masks instead of experts", about, runs, options.seeds, speed=duels)


if __name__ == "__main__":
    main()
