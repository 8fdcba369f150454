"""What the text examples share: arguments that name a model and data, and the data read.

Run with `--smoke`, they make a tiny random encoder and texts of their own, and need no network.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from hf_moebert.data import encode_text, label_names_of, load_splits


@dataclass
class SourceArguments:
    """What to start from, and where the data is."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pre-trained encoder: Hub id or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines, CSV, TSV or Parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on this many, drawn by `seed`."})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random model and made-up texts, offline."})


@dataclass
class TaskArguments(SourceArguments):
    """The same, and which columns of the data are read."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})


class TextTask:
    """A data set read and tokenized for one encoder."""

    def __init__(self, arguments: TaskArguments, *, tokenizer_from: str, seed: int) -> None:
        splits = read_splits(arguments, label_column=arguments.label_column, seed=seed)
        self.model_name_or_path = arguments.model_name_or_path
        self.labels = label_names_of(splits["train"], arguments.label_column)
        splits["train"] = draw(splits["train"], arguments.max_train_examples, seed=seed)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.data = encode_text(
            splits,
            self.tokenizer,
            text_column=arguments.text_column,
            text_pair_column=arguments.text_pair_column,
            label_column=arguments.label_column,
            label_names=self.labels,
            max_length=arguments.max_length,
        )

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        names = self.labels or ["score"]  # one output without a name is a regression
        return AutoModelForSequenceClassification.from_pretrained(
            self.model_name_or_path,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )


def read_splits(arguments: SourceArguments, *, label_column: str = "label", seed: int) -> DatasetDict:
    """Read "train" and "validation" from where the arguments say."""
    return load_splits(
        dataset_name=arguments.dataset_name,
        dataset_config_name=arguments.dataset_config_name,
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        label_column=label_column,
        seed=seed,
    )


def draw(examples: Dataset, count: int | None, *, seed: int) -> Dataset:
    """Draw this many examples; all of them, in their order, if there are no more."""
    if count is None or count >= len(examples):
        return examples
    return examples.shuffle(seed=seed).select(range(count))


def make_tiny_encoder(folder: Path, words: Sequence[str]) -> None:
    """Make a random encoder that knows these words only, for a run of seconds without a network."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate([*special, *words])})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, name: str, rows: Sequence[dict]) -> str:
    """Write JSON lines, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_smoke_inputs(task: TaskArguments, folder: Path) -> None:
    """Make a tiny encoder, and texts whose label is told by one word."""
    words = ["good", "bad", "film", "book", "meal", "this", "was", "a", "very", "day"]
    make_tiny_encoder(folder, words)
    task.model_name_or_path = str(folder)
    task.text_column, task.label_column = "text", "label"
    random = Random(0)
    for name, size in (("train_file", 64), ("validation_file", 32)):
        rows = [{"text": " ".join(random.choices(words[2:], k=5) + [w]), "label": w} for w in words[:2] * (size // 2)]
        setattr(task, name, write_rows(folder, name, rows))
