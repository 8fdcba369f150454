"""Tasks on texts: arguments that name a model and data, the data read, and what a model predicts.

Texts have a label, or words with a tag each. With `--smoke` a tiny random encoder and texts are made up, offline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from hf_moebert.data import encode_text, encode_tokens, label_names_of, load_splits, tag_names_of
from hf_moebert.measuring.metrics.accuracy.accuracy import accuracy
from hf_moebert.measuring.predictions import predict_logits
from hf_moebert.measuring.scores import REGRESSION_SCORES, tags_of


@dataclass
class SourceArguments:
    """The model to start from, and the data."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pre-trained encoder: Hub id or folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines, CSV, TSV or Parquet instead."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on this many, drawn by `seed`."})
    smoke: bool = field(default=False, metadata={"help": "Run on a tiny random model and made-up texts, offline."})


@dataclass
class TextArguments(SourceArguments):
    """The same, and which columns of labelled texts are read."""

    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})


@dataclass
class TaggingArguments(SourceArguments):
    """The same, and which columns of tagged words are read."""

    tokens_column: str = field(default="tokens", metadata={"help": "Column of the lists of words."})
    tags_column: str = field(default="tags", metadata={"help": "Column of the lists of tags."})
    held_out: int = field(default=400, metadata={"help": "Training sentences that choose, and are not trained on."})


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


def load_with_new_head(auto_class: type, encoder: str, names: Sequence[str]) -> PreTrainedModel:
    """Put a new head on an encoder; its values come from the seed that was set last."""
    label2id = {name: index for index, name in enumerate(names)}
    return auto_class.from_pretrained(encoder, id2label=dict(enumerate(names)), label2id=label2id)


class TextTask:
    """Labelled texts, tokenized for one encoder; classes, or the numbers of a regression.

    Args:
        arguments: What is read.
        seed: Of what is drawn.
        held_out: This many training examples choose instead of being trained on.
    """

    auto_class = AutoModelForSequenceClassification
    number = ".4f"

    def __init__(self, arguments: TextArguments, *, seed: int, held_out: int = 0) -> None:
        self.model_name_or_path = arguments.model_name_or_path
        splits = read_splits(arguments, label_column=arguments.label_column, seed=seed)
        self.labels = label_names_of(splits["train"], arguments.label_column)
        splits["train"] = draw(splits["train"], arguments.max_train_examples, seed=seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        data = encode_text(
            splits,
            self.tokenizer,
            text_column=arguments.text_column,
            text_pair_column=arguments.text_pair_column,
            label_column=arguments.label_column,
            label_names=self.labels,
            max_length=arguments.max_length,
        )
        self.train_dataset, self.validation = data["train"], data["validation"]
        if held_out:
            parts = self.train_dataset.train_test_split(held_out, seed=seed)
            self.train_dataset, self.held_out = parts["train"], parts["test"]
        self.references = np.asarray(self.validation["labels"])
        self.metrics = {"accuracy": accuracy} if self.labels else REGRESSION_SCORES["pearson_spearman"]

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        names = self.labels or ["score"]  # one output without a name is a regression
        return load_with_new_head(self.auto_class, self.model_name_or_path, names)

    def predict(self, model: PreTrainedModel) -> list:
        """Predict the validation examples: classes, or the numbers of a regression."""
        logits = predict_logits(model, self.validation, data_collator=self.collator)  # (examples, labels)
        return (logits[:, 0] if self.labels is None else logits.argmax(-1)).tolist()

    def score_held_out(self, model: PreTrainedModel) -> float:
        """Return the accuracy on the examples that choose."""
        predictions = predict_logits(model, self.held_out, data_collator=self.collator).argmax(-1)
        return accuracy(predictions, np.asarray(self.held_out["labels"]))


class TaggingTask:
    """Sentences of tagged words, tokenized for one encoder, some of those for training held out."""

    auto_class = AutoModelForTokenClassification

    def __init__(self, arguments: TaggingArguments, *, seed: int) -> None:
        self.model_name_or_path = arguments.model_name_or_path
        splits = read_splits(arguments, label_column=arguments.tags_column, seed=seed)
        self.names = tag_names_of(splits["train"], arguments.tags_column)
        splits["train"] = draw(splits["train"], arguments.max_train_examples, seed=seed)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        self.collator = DataCollatorForTokenClassification(self.tokenizer)
        data = encode_tokens(
            splits,
            self.tokenizer,
            tokens_column=arguments.tokens_column,
            tags_column=arguments.tags_column,
            tag_names=self.names,
            max_length=arguments.max_length,
        )
        words = sum(len(tags) for tags in splits["validation"][arguments.tags_column])
        parts = data["train"].train_test_split(arguments.held_out, seed=seed)
        self.train_dataset, self.held_out, self.validation = parts["train"], parts["test"], data["validation"]
        left = sum(len(tags) for tags in self.true_tags(self.validation))
        print(f"{len(self.train_dataset)} sentences to train on; {words - left} of {words} words to tag were cut off.")

    def true_tags(self, data: Dataset) -> list[list[str]]:
        """Name the tags of each sentence."""
        rows = [np.asarray(labels)[None] for labels in data["labels"]]  # (1, seq) each
        return [tags for row in rows for tags in tags_of(row, row, self.names)]

    def new_model(self) -> PreTrainedModel:
        """Put a new head on the encoder; its values come from the seed that was set last."""
        return load_with_new_head(self.auto_class, self.model_name_or_path, self.names)

    def batches(self, data: Dataset, size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
        """Pad the sentences, some at a time, in their order."""
        for start in range(0, len(data), size):
            yield self.collator([data[row] for row in range(start, min(start + size, len(data)))])

    def predict(self, model: PreTrainedModel, data: Dataset | None = None) -> list[dict[str, list]]:
        """Tag the words of each sentence, and return with them how probable the model finds each tag."""
        data, sentences = self.validation if data is None else data, []
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # little is padded
        for batch in self.batches(data.select(order)):
            words = (batch["labels"] != -100).numpy()  # (batch, seq)
            tags, shares = tag(model.eval(), batch, with_shares=True)
            named = tags_of(tags.cpu().numpy(), batch["labels"].numpy(), self.names)
            shares = [row[mask].round(4).tolist() for row, mask in zip(shares.cpu().numpy(), words, strict=True)]
            sentences += [{"tags": t, "shares": s} for t, s in zip(named, shares, strict=True)]
        return [sentences[place] for place in np.argsort(order)]


@torch.no_grad()
def tag(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], *, with_shares: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tag the words of a batch: by the best sequence if the model has a CRF, otherwise each word on its own.

    Returns:
        Indices of tags, and the probability of each if asked for, both of shape `(batch, seq)`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    if hasattr(model, "crf"):
        words = batch["labels"].to(model.device) != -100  # (batch, seq)
        outputs = model(**inputs, word_mask=words, output_marginals=with_shares)
        tags, shares = outputs.predictions, outputs.marginals
    else:
        logits = model(**inputs).logits.float()  # (batch, seq, tags)
        tags, shares = logits.argmax(-1), logits.softmax(-1) if with_shares else None
    if shares is None:
        return tags, None
    return tags, shares.float().gather(-1, tags.clamp(min=0)[..., None])[..., 0]
