"""What the text classification examples share: arguments that name a model and data, and the data read.

Run with `--smoke`, they make a tiny random encoder and texts of their own, and need no network.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

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
class TaskArguments:
    """What to start from, and on which data."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pre-trained encoder: Hub id or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines, CSV, TSV or Parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on this many, drawn by `seed`."})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random model and made-up texts, offline."})


class TextTask:
    """A data set read and tokenized for one encoder."""

    def __init__(self, arguments: TaskArguments, *, tokenizer_from: str, seed: int) -> None:
        splits = load_splits(
            dataset_name=arguments.dataset_name,
            dataset_config_name=arguments.dataset_config_name,
            train_file=arguments.train_file,
            validation_file=arguments.validation_file,
            label_column=arguments.label_column,
            seed=seed,
        )
        self.model_name_or_path = arguments.model_name_or_path
        self.labels = label_names_of(splits["train"], arguments.label_column)
        if arguments.max_train_examples is not None and arguments.max_train_examples < len(splits["train"]):
            splits["train"] = splits["train"].shuffle(seed=seed).select(range(arguments.max_train_examples))
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


def make_smoke_inputs(task: TaskArguments, folder: Path) -> None:
    """Make a tiny random encoder and texts whose label is told by one word, for a run of seconds without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["good", "bad", "film", "book", "meal", "this", "was", "a", "very", "day"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(special + words)})
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
    task.model_name_or_path = str(folder)
    task.text_column, task.label_column = "text", "label"
    random = Random(0)
    for name, size in (("train_file", 64), ("validation_file", 32)):
        rows = [{"text": " ".join(random.choices(words[2:], k=5) + [w]), "label": w} for w in words[:2] * (size // 2)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(task, name, str(path))
