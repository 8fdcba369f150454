"""Compress an embedding model with texts alone, and score students by the pairs that it was not taught on.

    python benchmarks/studies/embedding_models.py --smoke --output_dir build/embedding-smoke
    python benchmarks/studies/embedding_models.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --train_file texts.jsonl --validation_file stsb/validation.jsonl --text_pair_column text_pair \
        --seeds 0 1 2 --max_steps 300 --per_device_train_batch_size 16 --output_dir build/embedding

Every argument of `TrainingArguments` may be given; the others are below. `--train_file` holds texts, of which no label
is read; `--validation_file` pairs of texts and numbers that say how alike they are. A student is half of the neurons
and heads of the teacher (`pruned`, by `prune_structured`) or every second layer (`half-depth`), as it is and after
distillation by each recipe. Spearman's correlation is of the cosines of the pairs with those numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from quality_and_speed import halve_depth
from smoke import make_smoke_texts, write_rows
from study import Run, Study, StudyOptions
from tasks import TextArguments, draw
from timing import timing_rows
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_moebert import DistillationConfig, prune_structured
from hf_moebert.architectures.pooling import EmbeddingForm, read_embedding_form
from hf_moebert.data import read_file
from hf_moebert.measuring.metrics.pearson_spearman.pearson_spearman import spearman
from hf_moebert.measuring.predictions import predict_embeddings


RECIPES = {
    "cosine": {"hidden_states": False, "similarity_weight": 0.0},
    "squared": {"hidden_states": False, "similarity_weight": 0.0, "embedding_distance": "squared"},
    "cosine+similarities": {"hidden_states": False},
    "cosine+neighbours": {"hidden_states": False, "similarity_temperature": 0.05},
    "cosine+hidden": {"similarity_weight": 0.0},
    "all": {},
}
SHAPES = ("pruned", "half-depth")
ABOUT = "No label was read but to score; `cosine to the teacher` is the mean over the texts of the pairs."


@dataclass
class EmbeddingOptions(StudyOptions):
    """Runs of the study."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": f"Some of {', '.join(SHAPES)}."})
    recipes: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"Some of {', '.join(RECIPES)}."})


@dataclass(frozen=True)
class EmbeddingRun(Run):
    """A student's shape, and the recipe by which it is taught, if it is."""

    shape: str | None = None
    recipe: str | None = None


class EmbeddingTask:
    """Texts to learn from, and pairs of texts with numbers."""

    auto_class, number = AutoModel, ".4f"

    def __init__(self, arguments: TextArguments, *, seed: int) -> None:
        self.source = str(arguments.model_name_or_path)
        self.form = read_embedding_form(self.source) or EmbeddingForm()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.columns = [arguments.text_column, arguments.text_pair_column or arguments.text_column]
        self.length = arguments.max_length
        texts = draw(read_file(arguments.train_file), arguments.max_train_examples, seed=seed)
        self.texts = [text for text in texts[arguments.text_column] if text.strip()]
        self.train_dataset = self.encode(self.texts)
        pairs = read_file(arguments.validation_file)
        self.pairs = self.encode([text for column in self.columns for text in pairs[column]])
        self.references = np.asarray(pairs[arguments.label_column], dtype=float)
        self.metrics = {"Spearman": spearman}
        self.teachers = self.embed(self.new_model())

    def encode(self, texts: list[str]) -> Any:
        """Tokenize texts; nothing is padded."""
        return Dataset.from_dict(dict(self.tokenizer(texts, truncation=True, max_length=self.length)))

    def new_model(self) -> PreTrainedModel:
        """Load the teacher."""
        return AutoModel.from_pretrained(self.source)

    def embed(self, model: PreTrainedModel) -> np.ndarray:
        """Embed the first texts of all pairs, then the second ones: `(2 * pairs, hidden)`."""
        return predict_embeddings(model, self.pairs, data_collator=self.collator, pooling=self.form.pooling)

    def predict(self, model: PreTrainedModel) -> list:
        """Return the cosine of each pair, and keep how near its texts are to the teacher's."""
        embeddings = self.embed(model)
        self.nearness = float((embeddings * self.teachers).sum(-1).mean())
        first, second = np.split(embeddings, 2)
        return (first * second).sum(-1).tolist()


class EmbeddingStudy(Study):
    """A teacher that is trained already, and students of half its size."""

    def distillation_of(self, run: EmbeddingRun) -> DistillationConfig:
        """Return the recipe of a run, for the depth of its student."""
        recipe = DistillationConfig(pooling=self.task.form.pooling, **RECIPES[run.recipe])
        if run.shape == "half-depth" and recipe.hidden_states:
            depth = self.task.new_model().config.num_hidden_layers
            return DistillationConfig(**asdict(recipe) | {"layer_map": [*range(2, depth + 1, 2)]})
        return recipe

    def start(self, run: EmbeddingRun, seed: int) -> PreTrainedModel:
        """Return the teacher, or what is left of it."""
        if run.start is not None or run.shape is None:
            return super().start(run, seed)
        teacher = self.task.new_model()
        if run.shape == "half-depth":
            return halve_depth(teacher)
        return prune_structured(teacher, self.task.texts[:512], self.task.tokenizer, keep_ratio=0.5, seed=seed)

    def train(self, run: EmbeddingRun, seed: int) -> Trainer:
        """Teach a student, or leave the model as it is."""
        if run.recipe is not None:
            return super().train(run, seed)
        set_seed(seed)
        return Trainer(model=self.start(run, seed), args=self.args, processing_class=self.task.tokenizer)

    def settings(self, run: EmbeddingRun) -> dict[str, Any]:
        """Return the shape and the recipe, and of a taught student its training."""
        return (
            {"shape": run.shape} if run.recipe is None else super().settings(run) | asdict(self.distillation_of(run))
        )

    def findings(self, trainer: Trainer, run: EmbeddingRun) -> dict[str, Any]:
        """Return the mean cosine of the embeddings to the teacher's."""
        return {"cosine": self.task.nearness}

    def rows(self, runs: Sequence[EmbeddingRun], seeds: Sequence[int]) -> list[dict[str, str]]:
        """Add the cosine to the teacher to the rows, mean over the seeds."""
        rows = super().rows(runs, seeds)
        for row, run in zip(rows, runs, strict=True):
            cosines = [self.result(run.name, seed)["cosine"] for seed in seeds]
            row["cosine to the teacher"] = f"{np.mean(cosines):.4f}"
        return rows

    def speed_rows(self, runs: Sequence[EmbeddingRun], seed: int, *, rounds: int) -> list[dict[str, str]]:
        """Time the teacher and the untaught students in turns, on texts of the pairs in padded batches of eight."""
        batch = self.task.collator([self.task.pairs[index] for index in range(8)])

        def call(run: EmbeddingRun) -> Any:
            model = self.load(run.name, seed).eval()
            return torch.no_grad()(lambda: model(**batch))

        return timing_rows({run.name: call(run) for run in runs if run.recipe is None}, "speed-up", rounds=rounds)


def plan_runs(options: EmbeddingOptions) -> list[EmbeddingRun]:
    """Return the teacher, and each student before and after it is taught."""
    runs = [EmbeddingRun("teacher")]
    for shape in options.shapes:
        untaught = EmbeddingRun(shape, peer="teacher", shape=shape)
        taught = replace(untaught, start=shape, teacher="teacher")
        runs += [untaught, *(replace(taught, name=f"{shape}, {recipe}", recipe=recipe) for recipe in options.recipes)]
    return runs


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((TextArguments, EmbeddingOptions, TrainingArguments))
    arguments, options, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_pairs(arguments, Path(args.output_dir) / "inputs")
        args.save_strategy, options.samples = "no", 50
    study = EmbeddingStudy(EmbeddingTask(arguments, seed=args.seed), args, options)
    runs = plan_runs(options)
    study.make_all(runs, options.seeds)
    speed = study.speed_rows(runs, options.seeds[0], rounds=3 if arguments.smoke else 20)
    study.report("Embedding models", ABOUT, runs, options.seeds, speed=speed)


def make_smoke_pairs(arguments: TextArguments, folder: Path) -> None:
    """Make up texts, and pairs of them with numbers."""
    make_smoke_texts(arguments, folder)
    texts = read_file(arguments.train_file)["text"][:]
    rows = [{"text": texts[row], "text_pair": texts[-row - 1], "label": row / 7} for row in range(16)]
    arguments.validation_file, arguments.text_pair_column = write_rows(folder, "pairs", rows), "text_pair"


if __name__ == "__main__":
    main()
