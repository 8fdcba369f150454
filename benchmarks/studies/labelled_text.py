"""A classification task in words: a language model reads a text and says the label as the word that comes next."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from smoke import write_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moebert.data import load_splits


ARROW = " =>"  # between a text and the word for its label


@dataclass
class LabelledTextArguments:
    """Where the labelled texts are, if there are any, and how they are mixed with the plain text."""

    task_train_file: str | None = field(default=None, metadata={"help": "JSON lines with `text` and `label`."})
    task_validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    label_words: list[str] = field(
        default_factory=lambda: ["negative", "positive"], metadata={"help": "What the labels 0, 1, ... are called."}
    )
    task_share: float = field(default=0.5, metadata={"help": "Share of the training rows that is labelled texts."})
    max_task_examples: int | None = field(default=None, metadata={"help": "Evaluate on this many, the first."})

    def __post_init__(self) -> None:
        if not 0 < self.task_share < 1:
            raise ValueError(f"`task_share` must be in (0, 1), got {self.task_share}. Use 0.5 for half of the rows.")


class LabelledText:
    """Labelled texts, whose labels a language model may know."""

    def __init__(self, arguments: LabelledTextArguments) -> None:
        self.words = arguments.label_words
        splits = load_splits(train_file=arguments.task_train_file, validation_file=arguments.task_validation_file)
        for split in splits.values():
            if not {"text", "label"} <= set(split.column_names):
                raise ValueError(
                    f"Labelled texts must have the columns text and label, got {', '.join(split.column_names)}. "
                    "Rename what holds them."
                )
            if strange := set(split["label"]) - set(range(len(self.words))):
                raise ValueError(
                    f"`label_words` must name every label, got {self.words} for labels such as {strange.pop()!r}. "
                    "Give a word for each of 0, 1, ..."
                )
        examples = splits["train"].shuffle(seed=0)  # files are often sorted by label, and only a part may be used
        self.train = list(zip(examples["text"], examples["label"], strict=True))
        examples = splits["validation"][: arguments.max_task_examples]
        self.validation = list(zip(examples["text"], examples["label"], strict=True))

    def as_text(self) -> str:
        """Write the training examples one after the other, each with its word."""
        return "".join(f"{text.strip()}{ARROW} {self.words[label]}\n" for text, label in self.train)

    def prompts(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], size: int) -> list[list[int]]:
        """Turn each text and what asks for its label into tokens; of what is too long the end is kept."""
        ids = tokenizer([text.strip() + ARROW for text in texts], add_special_tokens=False)["input_ids"]
        return [row[-size:] for row in ids]

    def answers(self, tokenizer: PreTrainedTokenizerBase, *, reads_first: bool) -> list[list[int]]:
        """Turn each label's word into the tokens that follow a prompt.

        Raises:
            ValueError: If two words begin with the same token.
        """
        if reads_first:
            answers = tokenizer(self.words, add_special_tokens=False)["input_ids"]
        else:
            prompt = len(tokenizer(ARROW, add_special_tokens=False)["input_ids"])
            whole = tokenizer([f"{ARROW} {word}" for word in self.words], add_special_tokens=False)["input_ids"]
            answers = [row[prompt:] for row in whole]
        if len({row[0] for row in answers}) < len(self.words):
            raise ValueError(
                f"`label_words` must differ in their first token, got {self.words}. Choose words that begin otherwise."
            )
        return answers

    def rows(self, tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
        """Make a training row for an encoder-decoder of each example, padded to `size` tokens on both sides."""
        answers = [row + [tokenizer.eos_token_id] for row in self.answers(tokenizer, reads_first=True)]
        prompts = self.prompts(tokenizer, [text for text, _ in self.train], size)
        columns: dict[str, np.ndarray] = {
            name: np.full((len(prompts), size), value)
            for name, value in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100))
        }  # (examples, tokens)
        for row, (prompt, (_, label)) in enumerate(zip(prompts, self.train, strict=True)):
            columns["input_ids"][row, : len(prompt)] = prompt
            columns["attention_mask"][row, : len(prompt)] = 1
            columns["labels"][row, : len(answers[label])] = answers[label]
        return Dataset.from_dict(columns)

    @torch.no_grad()
    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int) -> list[float]:
        """Return 1 for each validation example whose word gets a higher logit than the others, else 0."""
        reads_first = model.config.is_encoder_decoder
        words = [row[0] for row in self.answers(tokenizer, reads_first=reads_first)]
        prompts = self.prompts(tokenizer, [text for text, _ in self.validation], size)
        labels = torch.tensor([label for _, label in self.validation])
        right = torch.zeros(len(prompts))
        for batch in batches_of_one_length(prompts):
            inputs = {"input_ids": torch.tensor([prompts[n] for n in batch], device=model.device)}  # (batch, tokens)
            if reads_first:
                start = model.config.decoder_start_token_id
                inputs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
            logits = model(**inputs).logits[:, -1, words].cpu()  # (batch, labels)
            right[batch] = (logits.argmax(-1) == labels[batch]).float()
        return right.tolist()


def batches_of_one_length(rows: list[list[int]], size: int = 32) -> list[list[int]]:
    """Put the indices of rows that are equally long together, so that none needs padding."""
    alike = defaultdict(list)
    for index, row in enumerate(rows):
        alike[len(row)].append(index)
    return [group[n : n + size] for group in alike.values() for n in range(0, len(group), size)]


def mix(text: Dataset, labelled: Dataset, share: float) -> Dataset:
    """Put as many rows of both together as there are if `share` of them, in (0, 1), is labelled."""
    total = min(len(text) / (1 - share), len(labelled) / share)
    parts = (text, total * (1 - share)), (labelled, total * share)
    return concatenate_datasets([rows.select(range(round(count))).cast(text.features) for rows, count in parts])


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of the labelled texts, where the references are 1, whose label is known."""
    return float(predictions[references == 1].mean())


def make_smoke_task(arguments: LabelledTextArguments, folder: Path) -> None:
    """Make texts whose label is told by one word."""
    random = Random(0)
    for name, size in (("task_train_file", 200), ("task_validation_file", 40)):
        labels = [random.randint(0, 1) for _ in range(size)]
        rows = [
            {"text": f"A {('bad', 'good')[label]} film of {random.randint(2, 99)} hours.", "label": label}
            for label in labels
        ]
        setattr(arguments, name, write_rows(folder, name, rows))
