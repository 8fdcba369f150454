"""Cut an encoder to half and a quarter by chains and by two factors, and heal each form with the dense model.

    python benchmarks/studies/mpo_healing.py --smoke --output_dir build/mpo-healing-smoke
    python benchmarks/studies/mpo_healing.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file sst2/train.jsonl --validation_file sst2/validation.jsonl --seeds 0 1 2 --teacher_steps 300 \
        --max_steps 150 --learning_rate 2e-4 --output_dir build/healing-sst2
    python benchmarks/studies/mpo_healing.py --embedder --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file texts.jsonl --validation_file stsb/validation.jsonl --text_pair_column text_pair … \
        --students factors-0.5 chains-0.5 plain-0.5 --output_dir build/healing-stsb

Every argument of `TrainingArguments` may be given; the others are below. Each seed fine-tunes the encoder densely, and
every student but the adapters begins as that model, cut by `compress_mpo`, before and after the same steps with it as
the teacher. With `--embedder` the dense model is the encoder as it is, texts have no labels, and students are scored
by pairs of texts. A student is a form and the share of the parameters that it keeps:

- `chains`: all matrices as chains of five; `factors`: as two factors; `mixture`: a chain for the table of words, two
  factors for the rest; all calibrated with training texts. `plain`: two factors by singular values alone;
- `full`: the dense model, trained for as long as the students;
- `lora`, `lokr`: adapters of the encoder, taught for the steps of the dense model and of a student together.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from embedding_models import EmbeddingTask, make_smoke_pairs
from mpop_text_classification import TARGETS, AdaptedStudy
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from smoke import make_smoke_texts
from study import Run, StudyOptions
from tasks import TextArguments, TextTask
from torch.utils.data import DataLoader, Subset
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_moebert import DistillationConfig, compress_mpo


FORMS: dict[str, dict[str, Any]] = {
    "chains": {"num_cores": 5, "gauge": "even"},  # which bears the learning rate of two factors
    "factors": {"num_cores": 2},
    "mixture": {"num_cores": 2, "table_cores": 5, "gauge": "even"},
    "plain": {"num_cores": 2},
}
SHARES = ("0.5", "0.25")
STUDENTS = [*(f"{form}-{share}" for share in SHARES for form in FORMS), "full", "lora", "lokr"]
ABOUT = """\
All students but the adapters begin as the dense model of their seed, and learn from it for the same steps. The \
number is the share of the parameters of linear layers and table that is kept; `cut` is before any step.\
"""


@dataclass
class HealingOptions(StudyOptions):
    """Runs of the study."""

    students: list[str] = field(default_factory=lambda: list(STUDENTS), metadata={"help": "Rows of the table."})
    embedder: bool = field(default=False, metadata={"help": "Teach embeddings by texts without labels."})
    teacher_steps: int = field(default=300, metadata={"help": "Steps of the dense model."})
    calibration_texts: int = field(default=1000, metadata={"help": "Training texts that calibrate."})
    adapter_rate: float = field(default=1e-3, metadata={"help": "Learning rate of adapters."})
    lora_rank: int = field(default=64, metadata={"help": "Rank of LoRA: choose it for as many weights as `lokr`."})
    lokr_rank: int = field(default=10_000, metadata={"help": "Rank of LoKr; by default its factors are full."})
    lokr_factor: int = field(
        default=2, metadata={"help": "`decompose_factor` of LoKr: 2 trains a quarter of a layer."}
    )


@dataclass(frozen=True)
class HealedRun(Run):
    """A student: its form, and the share of the parameters that it keeps."""

    form: str | None = None
    keep_ratio: float | None = None


class HealingStudy(AdaptedStudy):
    """A dense model, and students that are cut from it and taught by it."""

    def arguments(self, run: HealedRun) -> TrainingArguments:
        """Train the dense model for steps of its own, and adapters for those of both."""
        args, options = copy.deepcopy(self.args), self.options
        if run.form in ("lora", "lokr"):
            args.max_steps += options.teacher_steps
            args.learning_rate = options.adapter_rate
        elif run.form is None:
            args.max_steps = options.teacher_steps
        return args

    def distillation_of(self, run: HealedRun) -> DistillationConfig:
        """Return the default recipe, with the pooling of an embedder."""
        return DistillationConfig(pooling=self.task.form.pooling if self.options.embedder else None)

    def settings(self, run: HealedRun) -> dict[str, Any]:
        """Add the form, and what calibrated it."""
        made = {"form": run.form, "keep_ratio": run.keep_ratio, "texts": self.options.calibration_texts}
        return super().settings(run) | made

    def start(self, run: HealedRun, seed: int) -> PreTrainedModel | PeftModel:
        """Return the encoder, an adapter on it, the dense model of the seed, or what is cut from that."""
        if self.options.embedder and run.start == "dense" and seed != self.options.seeds[0]:
            return self.load(run.name, self.options.seeds[0])  # all seeds have one dense model
        model = super().start(run, seed)
        adapter: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
        lora, lokr, factor = self.options.lora_rank, self.options.lokr_rank, self.options.lokr_factor
        if run.form == "lora":
            return get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, **adapter))
        if run.form == "lokr":
            return get_peft_model(model, LoKrConfig(r=lokr, alpha=lokr, decompose_factor=factor, **adapter))
        if run.form in FORMS and run.teacher is None:
            known = {} if run.form == "plain" else {"calibration": self.calibration()}
            return compress_mpo(model, keep_ratio=run.keep_ratio, train_centre=True, **FORMS[run.form], **known)
        return model

    def calibration(self) -> Iterable[dict]:
        """Return the first training texts in batches; they are in random order."""
        count = min(self.options.calibration_texts, len(self.task.train_dataset))
        rows = Subset(self.task.train_dataset, range(count))
        return DataLoader(rows, batch_size=32, collate_fn=self.task.collator)

    def train(self, run: HealedRun, seed: int) -> Trainer:
        """Train a classifier or teach a student; leave an embedder, and what is cut alone, as they are."""
        if run.teacher is not None or (run.form is None and not self.options.embedder):
            return super().train(run, seed)
        set_seed(seed)
        return Trainer(model=self.start(run, seed), args=self.args, processing_class=self.task.tokenizer)

    def findings(self, trainer: Trainer, run: HealedRun) -> dict[str, Any]:
        """Return the mean cosine of an embedder's texts to those of the dense model."""
        return {"cosine": self.task.nearness} if self.options.embedder else {}

    def rows(self, runs: Any, seeds: Any) -> list[dict[str, str]]:
        """Add that cosine to the rows, mean over the seeds."""
        rows = super().rows(runs, seeds)
        for row, run in zip(rows, runs, strict=True):
            found = [self.result(run.name, seed).get("cosine") for seed in seeds]
            if None not in found:
                row["cosine to dense"] = f"{sum(found) / len(found):.4f}"
        return rows


def plan_runs(students: Iterable[str]) -> list[HealedRun]:
    """Return the dense run, and each student; those that are cut also before they are taught."""
    runs = [HealedRun("dense")]
    for name in students:
        form, _, share = name.rpartition("-")
        if form in FORMS:
            cut = HealedRun(f"{name}, cut", start="dense", peer="dense", form=form, keep_ratio=float(share))
            runs += [cut, replace(cut, name=name, start=cut.name, teacher="dense")]
        else:
            start = "dense" if name == "full" else None
            runs.append(HealedRun(name, start=start, teacher="dense", peer="dense", form=name))
    return runs


def main() -> None:
    """Make the runs that are missing, then the table."""
    parser = HfArgumentParser((TextArguments, HealingOptions, TrainingArguments))
    arguments, options, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_inputs = make_smoke_pairs if options.embedder else make_smoke_texts
        make_inputs(arguments, Path(args.output_dir) / "inputs")
        args.save_strategy, args.max_steps, args.use_cpu = "no", 2, True
        options.teacher_steps, options.samples, options.lora_rank = 2, 50, 2
    task = (EmbeddingTask if options.embedder else TextTask)(arguments, seed=args.seed)
    study = HealingStudy(task, args, options)
    runs = plan_runs(options.students)
    study.make_all(runs, options.seeds)
    study.report("Healing matrix product operators", ABOUT, runs, options.seeds)


if __name__ == "__main__":
    main()
