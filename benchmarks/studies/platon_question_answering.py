"""Prune an encoder while it learns to extract answers, by PLATON and by magnitude under one schedule.

    python benchmarks/studies/platon_question_answering.py --smoke --output_dir build/questions-smoke
    python benchmarks/studies/platon_question_answering.py --model_name_or_path google-bert/bert-base-uncased \
        --dataset_name rajpurkar/squad --max_length 384 --learning_rate 5e-5 --output_dir build/squad
    python benchmarks/studies/platon_question_answering.py --model_name_or_path FOLDER --max_steps 200 \
        --learning_rate 3e-4 --warmup_steps 0.1 --per_device_train_batch_size 16 --logging_steps 10 \
        --output_dir build/questions

Data has SQuAD 1.1's columns: `question`, `context` and `answers`, with the lists `text` and `answer_start`; contexts
that are too long are cut, not read in pieces. Without a data set or file the script makes up a SYNTHETIC task: a few
sentences such as "The red box holds 17 coins." and questions about them. It is easy, and shows that the parts fit
together; its scores say nothing about real texts. Every argument of `TrainingArguments`, `PlatonConfig` and
`DistillationConfig` may be given; the others are below. Finished runs are not repeated when the command is run again.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
from pruning import PrunedRun, PruningOptions, PruningStudy, plan_runs
from smoke import make_tiny_encoder, write_rows
from tasks import SourceArguments, draw, read_splits
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
)

from hf_moebert import DistillationConfig, PlatonConfig
from hf_moebert.data.questions import encode_questions
from hf_moebert.measuring.metrics.squad.squad import best_over, exact_match, token_f1
from hf_moebert.measuring.predictions import predict_answers


COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
PLACES = ("box", "bag", "chest", "basket", "drawer", "jar")
THINGS = ("coins", "stamps", "keys", "shells", "beads", "nails")


@dataclass
class QuestionOptions(PruningOptions):
    """Runs of the study, and how many questions to make up where there is no data."""

    keep_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.2], metadata={"help": "Shares of the encoder's weights that are kept."}
    )
    criteria: list[str] = field(
        default_factory=lambda: ["magnitude", "platon"], metadata={"help": "See PlatonConfig."}
    )
    distil: bool = field(default=False, metadata={"help": "Also run PLATON with the dense model as its teacher."})
    synthetic_train_examples: int = field(default=8000, metadata={"help": "Questions made up to train on."})
    synthetic_validation_examples: int = field(default=1000, metadata={"help": "And to evaluate on."})


class QuestionTask:
    """Questions whose answers are spans of a text, tokenized for one encoder."""

    auto_class = AutoModelForQuestionAnswering
    number = ".1f"  # percent

    def __init__(self, source: SourceArguments, *, seed: int) -> None:
        self.model_name_or_path = source.model_name_or_path
        self.tokenizer = AutoTokenizer.from_pretrained(source.model_name_or_path)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        splits = read_splits(source, seed=seed)
        splits["train"] = draw(splits["train"], source.max_train_examples, seed=seed)
        data = encode_questions(splits, self.tokenizer, max_length=source.max_length)
        self.train_dataset, self.validation = data["train"], data["validation"]
        cut = self.train_dataset["end_positions"][:].count(0)
        print(f"{len(self.train_dataset)} questions to train on; the answers to {cut} of them were cut off.")
        self.references = np.fromiter((tuple(a["text"]) for a in self.validation["answers"]), dtype=object)
        self.metrics = {"exact match": mean_of_best(exact_match), "F1": mean_of_best(token_f1)}

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        return AutoModelForQuestionAnswering.from_pretrained(self.model_name_or_path)

    def inputs(self, rows: dict[str, list]) -> dict[str, torch.Tensor]:
        """Pad what a model reads of some examples."""
        names = [name for name in self.tokenizer.model_input_names if name in rows]
        return self.tokenizer.pad({name: rows[name] for name in names}, return_tensors="pt")

    def predict(self, model: PreTrainedModel) -> list[str]:
        """Extract an answer from the context of each validation example."""
        return predict_answers(model, self.validation, data_collator=self.collator)


def mean_of_best(measure: Callable[[str, str], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """Make the SQuAD metric of many predictions out of the measure of one, in percent."""
    remembered = cache(lambda prediction, golds: best_over(measure, prediction, golds))  # resampling asks many times

    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        return 100 * float(np.mean([remembered(*pair) for pair in zip(predictions, references, strict=True)]))

    return score


def make_question(random: Random) -> dict:
    """Make up four sentences that say where things are, and a question about one of them."""
    places = random.sample([f"The {colour} {place}" for colour, place in product(COLOURS, PLACES)], k=4)
    facts = list(zip(places, random.sample(range(2, 100), k=4), random.choices(THINGS, k=4), strict=True))
    sentences = [f"{place} holds {number} {things}." for place, number, things in facts]
    asked = random.randrange(4)
    place, number, things = facts[asked]
    question, answer = random.choice(
        [
            (f"How many {things} does {place.lower()} hold?", f"{number}"),
            (f"What does {place.lower()} hold?", f"{number} {things}"),
            (f"Where are the {number} {things}?", place),
        ]
    )
    context = " ".join(sentences)
    start = context.index(sentences[asked]) + sentences[asked].index(answer)
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def make_synthetic_task(source: SourceArguments, folder: Path, *, sizes: dict[str, int], seed: int) -> None:
    """Write made-up questions, the same for the same seed, and for a smoke run an encoder that knows their words."""
    random, texts = Random(seed), ""
    for name, size in sizes.items():
        rows = [make_question(random) for _ in range(size)]
        setattr(source, name, write_rows(folder, name, rows))
        texts += " ".join(f"{row['question']} {row['context']}" for row in rows).lower()
    if source.smoke:
        make_tiny_encoder(folder, sorted(set(re.findall(r"\w+|[^\w\s]", texts))))
        source.model_name_or_path = str(folder)


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = HfArgumentParser((SourceArguments, QuestionOptions, TrainingArguments, PlatonConfig, DistillationConfig))
    source, options, args, recipe, distillation = parser.parse_args_into_dataclasses()
    if not (source.model_name_or_path or source.smoke):
        parser.error("Give --model_name_or_path, or --smoke for a tiny random model.")
    about = f"Questions of {source.dataset_name or source.train_file}."
    if source.smoke or not (source.dataset_name or source.train_file):
        sizes = {
            "train_file": 64 if source.smoke else options.synthetic_train_examples,
            "validation_file": 64 if source.smoke else options.synthetic_validation_examples,
        }
        make_synthetic_task(source, Path(args.output_dir) / "inputs", sizes=sizes, seed=args.seed)
        about = "SYNTHETIC questions, made up by this script from a few words: no measure of quality on real texts."
    if source.smoke:
        args.logging_steps, args.save_strategy, options.samples = 5, "no", 50
    task = QuestionTask(source, seed=args.seed)
    study = PruningStudy(task, args, options, distillation)

    dense, distil = PrunedRun("dense"), options.distil
    runs = [dense, *plan_runs(recipe, options.criteria, options.keep_ratios, baseline=dense, distil=distil)]
    study.make_all(runs, options.seeds)
    speed = ()
    if recipe.granularity == "structured":
        speed = study.speed_rows(runs, options.seeds[0], task.inputs(task.validation[:1]))
    study.report("A pruned reader of questions", about, runs, options.seeds, speed=speed)


if __name__ == "__main__":
    main()
